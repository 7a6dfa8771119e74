//! `vmctl ca`

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use api::controller as pb;
use api::controller::certificates_client::CertificatesClient;

use crate::cli::ca::CaCommand;
use crate::cli::{Format, Global};
use crate::{client, json, output};

/// Runs one command.
pub(crate) async fn run(global: &Global, command: CaCommand) -> anyhow::Result<ExitCode> {
    let mut client = CertificatesClient::new(client::connect(global).await?);
    match command {
        CaCommand::Show { pem } => {
            let listed = client.list_authorities(pb::ListAuthoritiesRequest {}).await;
            let listed = listed.map_err(client::failed)?.into_inner();
            show(global, &listed, pem)?;
        }
        CaCommand::Rotate => {
            let made = client.rotate_authority(pb::RotateAuthorityRequest {}).await;
            let made = made.map_err(client::failed)?.into_inner();
            match global.output {
                Format::Json => json::print(&json::value("Authority", &made)?),
                Format::Table => println!("{} makes certificates now", output::id(&made.name)),
            }
        }
        CaCommand::Delete { authority, force } => {
            let name = match authority.contains('/') {
                true => authority.clone(),
                false => format!("authorities/{authority}"),
            };
            let deleted = client.delete_authority(pb::DeleteAuthorityRequest { name, force });
            deleted.await.map_err(client::failed)?;
            if !global.quiet {
                println!("authority {authority} is believed no more");
            }
        }
        CaCommand::Issue {
            user,
            roles,
            projects,
            ttl,
            dir,
        } => {
            let made = pki::Request::new()?;
            let request = pb::IssueUserCertificateRequest {
                user: user.clone(),
                roles,
                projects,
                request: made.der,
                lifetime_s: ttl,
            };
            let issued = client.issue_user_certificate(request).await;
            let issued = issued.map_err(client::failed)?.into_inner();
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
            let file = |name: String| dir.join(name);
            write(&file(format!("{user}.key")), &made.key_pem)?;
            write(&file(format!("{user}.pem")), &issued.chain)?;
            write(&file("ca.pem".to_owned()), &issued.authorities)?;
            if !global.quiet {
                let until = output::time(issued.expire_time);
                println!(
                    "{user}.pem, {user}.key and ca.pem are in {}; good until {until}",
                    dir.display()
                );
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(global: &Global, listed: &pb::ListAuthoritiesResponse, pem: bool) -> anyhow::Result<()> {
    if pem {
        let authorities = listed.authorities.iter();
        authorities.for_each(|authority| print!("{}", authority.certificate));
        return Ok(());
    }
    if global.output == Format::Json {
        json::print(&json::value("ListAuthoritiesResponse", listed)?);
        return Ok(());
    }
    let header = ["AUTHORITY", "AGE", "MAKES", "HOSTS", "SHA256"];
    let rows = listed.authorities.iter().map(|authority| {
        vec![
            output::id(&authority.name),
            output::age(authority.create_time),
            match authority.active {
                true => "certificates".to_owned(),
                false => "none".to_owned(),
            },
            authority.hosts.to_string(),
            authority.sha256.clone(),
        ]
    });
    output::table(&header, &rows.collect::<Vec<_>>());
    Ok(())
}

/// For this user alone: a key is among them.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let file = options.open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}
