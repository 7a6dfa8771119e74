//! The `Certificates` service.

use ::api::controller::certificates_server::Certificates as Service;
use ::api::controller::*;
use ::api::errors::status;
use tonic::{Code, Request, Response, Status};

use super::{caller, store_status};
use crate::certificates::{CertificateError, Certificates};
use crate::reconciler::with_source;

/// See the module.
pub struct CertificateService(Option<Certificates>);

impl CertificateService {
    /// Of a controller with these, if it has any.
    pub fn new(certificates: Option<Certificates>) -> Self {
        Self(certificates)
    }

    fn ours(&self) -> Result<&Certificates, Status> {
        self.0.as_ref().ok_or_else(|| {
            let message =
                "this controller speaks no TLS, so nobody has certificates; start it with --listen https://HOST:PORT";
            status(Code::FailedPrecondition, "NO_TLS", message, &[])
        })
    }
}

#[tonic::async_trait]
impl Service for CertificateService {
    async fn list_authorities(
        &self,
        _request: Request<ListAuthoritiesRequest>,
    ) -> Result<Response<ListAuthoritiesResponse>, Status> {
        let authorities = self.ours()?.authorities().await.map_err(refused)?;
        Ok(Response::new(ListAuthoritiesResponse { authorities }))
    }

    async fn rotate_authority(
        &self,
        _request: Request<RotateAuthorityRequest>,
    ) -> Result<Response<Authority>, Status> {
        let rotated = self.ours()?.rotate().await;
        rotated.map(Response::new).map_err(refused)
    }

    async fn delete_authority(
        &self,
        request: Request<DeleteAuthorityRequest>,
    ) -> Result<Response<DeleteAuthorityResponse>, Status> {
        let request = request.into_inner();
        let ours = self.ours()?;
        let deleted = ours.delete_authority(&request.name, request.force).await;
        deleted.map_err(refused)?;
        Ok(Response::new(DeleteAuthorityResponse {}))
    }

    async fn issue_user_certificate(
        &self,
        request: Request<IssueUserCertificateRequest>,
    ) -> Result<Response<IssuedCertificate>, Status> {
        let issued = self.ours()?.issue_user(&request.into_inner());
        issued.map(Response::new).map_err(refused)
    }

    async fn create_host_token(
        &self,
        request: Request<CreateHostTokenRequest>,
    ) -> Result<Response<CreateHostTokenResponse>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        if !request.host.is_empty() {
            ::api::validate::flat_name(&request.host, "hosts")?;
        }
        let ours = self.ours()?;
        let made = ours.create_token(&request.host, request.ttl_s, &caller.name);
        made.await.map(Response::new).map_err(refused)
    }

    async fn list_host_tokens(
        &self,
        _request: Request<ListHostTokensRequest>,
    ) -> Result<Response<ListHostTokensResponse>, Status> {
        let host_tokens = self.ours()?.tokens().await.map_err(refused)?;
        Ok(Response::new(ListHostTokensResponse { host_tokens }))
    }

    async fn delete_host_token(
        &self,
        request: Request<DeleteHostTokenRequest>,
    ) -> Result<Response<DeleteHostTokenResponse>, Status> {
        let deleted = self.ours()?.delete_token(&request.into_inner().name).await;
        deleted.map_err(refused)?;
        Ok(Response::new(DeleteHostTokenResponse {}))
    }

    async fn join_host(
        &self,
        request: Request<JoinHostRequest>,
    ) -> Result<Response<JoinHostResponse>, Status> {
        let joined = self.ours()?.join(&request.into_inner()).await;
        joined.map(Response::new).map_err(refused)
    }

    async fn renew_host_certificate(
        &self,
        request: Request<RenewHostCertificateRequest>,
    ) -> Result<Response<IssuedCertificate>, Status> {
        let shown = request.peer_certs();
        let shown = shown.as_ref().and_then(|chain| chain.first());
        let shown = shown.map(|leaf| leaf.to_vec());
        let asked = request.into_inner().request;
        let renewed = self.ours()?.renew_host(shown.as_deref(), &asked).await;
        renewed.map(Response::new).map_err(refused)
    }
}

fn refused(error: CertificateError) -> Status {
    let message = with_source(&error);
    let (code, reason) = match error {
        CertificateError::Store(error) => return store_status(error),
        CertificateError::NotOurs => (Code::FailedPrecondition, "FOREIGN_AUTHORITY"),
        CertificateError::NoAuthority => (Code::Unavailable, "NO_AUTHORITY"),
        CertificateError::NoSuch(_) => (Code::NotFound, "NOT_FOUND"),
        CertificateError::Active(_) => (Code::FailedPrecondition, "AUTHORITY_ACTIVE"),
        CertificateError::InUse(..) => (Code::FailedPrecondition, "AUTHORITY_IN_USE"),
        CertificateError::BadUser(_)
        | CertificateError::BadHost(_)
        | CertificateError::Issue(_) => (Code::InvalidArgument, "BAD_REQUEST"),
        CertificateError::UnknownToken => (Code::PermissionDenied, "UNKNOWN_HOST_TOKEN"),
        CertificateError::UsedToken { .. } => (Code::PermissionDenied, "HOST_TOKEN_USED"),
        CertificateError::ExpiredToken { .. } => (Code::PermissionDenied, "HOST_TOKEN_EXPIRED"),
        CertificateError::ForeignToken { .. } => (Code::PermissionDenied, "HOST_TOKEN_FOREIGN"),
        CertificateError::Known { .. } => (Code::PermissionDenied, "HOST_KNOWN"),
        CertificateError::Withdrawn { .. } => (Code::PermissionDenied, "HOST_DELETED"),
        CertificateError::NoHostCertificate => (Code::Unauthenticated, "NO_HOST_CERTIFICATE"),
        CertificateError::Secret(_) | CertificateError::Material(_) => {
            (Code::Internal, "CERTIFICATES")
        }
    };
    status(code, reason, message, &[])
}
