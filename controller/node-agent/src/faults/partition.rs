//! A service that nobody reaches while the host is cut off from its controllers, as far as one host can
//! show that.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll},
};

use tonic::{
    Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
};

use super::Knobs;

/// `inner`, or UNAVAILABLE.
#[derive(Clone, Debug)]
pub(crate) struct Partitioned<S> {
    inner: S,
    knobs: Knobs,
}

impl<S> Partitioned<S> {
    pub(crate) fn new(inner: S, knobs: &Knobs) -> Self {
        Self {
            inner,
            knobs: knobs.clone(),
        }
    }
}

impl<S: NamedService> NamedService for Partitioned<S> {
    const NAME: &'static str = S::NAME;
}

type Answer = Result<http::Response<Body>, Infallible>;

impl<S> Service<http::Request<Body>> for Partitioned<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Unpin,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Either<Ready<Answer>, S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if self.knobs.is_partitioned() {
            let status = Status::unavailable("a fault keeps this agent from its controllers");
            return Either::Left(ready(Ok(status.into_http())));
        }
        Either::Right(self.inner.call(request))
    }
}

/// One of two futures.
#[derive(Debug)]
pub(crate) enum Either<A, B> {
    Left(A),
    Right(B),
}

impl<A, B> Future for Either<A, B>
where
    A: Future + Unpin,
    B: Future<Output = A::Output> + Unpin,
{
    type Output = A::Output;

    fn poll(self: std::pin::Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Left(left) => std::pin::Pin::new(left).poll(context),
            Self::Right(right) => std::pin::Pin::new(right).poll(context),
        }
    }
}
