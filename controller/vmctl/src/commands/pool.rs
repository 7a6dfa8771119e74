//! `vmctl pool`

use std::process::ExitCode;

use api::controller as pb;
use api::controller::pool_spec::Kind;
use api::controller::pools_client::PoolsClient;

use crate::cli::pool::PoolCommand;
use crate::cli::{Format, Global};
use crate::{client, json, output, spec};

/// Runs one command on pools.
pub(crate) async fn run(global: &Global, command: PoolCommand) -> anyhow::Result<ExitCode> {
    let mut client = PoolsClient::new(client::connect(global).await?);
    match command {
        PoolCommand::Create {
            name,
            nbd,
            tls_file,
            tls_hostname,
            shared_directory,
            request_id,
        } => {
            let absolute = |path: Option<std::path::PathBuf>| match path {
                Some(path) => spec::absolute(&path),
                None => Ok(String::new()),
            };
            let tls_file = absolute(tls_file)?;
            let path = absolute(shared_directory)?;
            let kind = match nbd {
                Some(address) => Kind::Nbd(pb::NbdPool {
                    address,
                    tls_file,
                    tls_hostname: tls_hostname.unwrap_or_default(),
                }),
                None => Kind::SharedDirectory(pb::SharedDirectory { path }),
            };
            let request = pb::CreatePoolRequest {
                pool_id: name,
                pool: Some(pb::Pool {
                    spec: Some(pb::PoolSpec { kind: Some(kind) }),
                    ..Default::default()
                }),
                request_id: client::request_id(request_id),
                validate_only: false,
            };
            let made = client.create_pool(request).await;
            let made = made.map_err(client::failed)?.into_inner();
            if global.output == Format::Json {
                json::print(&json::value("Pool", &made)?);
            } else if !global.quiet {
                println!("pool {} created", output::id(&made.name));
            }
            if !made.fenced {
                eprintln!(
                    "vmctl: nothing keeps a host from writing to volumes of this pool after it lost them; \
                     see docs/fleet.md"
                );
            }
        }
        PoolCommand::List => {
            let mut pools = vec![get(&mut client, api::validate::LOCAL_POOL).await?];
            let mut page_token = String::new();
            loop {
                let request = pb::ListPoolsRequest {
                    page_size: super::PAGE_SIZE,
                    page_token,
                    ..Default::default()
                };
                let page = client.list_pools(request).await;
                let page = page.map_err(client::failed)?.into_inner();
                pools.extend(page.pools);
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            list(global, &pools)?;
        }
        PoolCommand::Show { name } => {
            let pool = get(&mut client, &name).await?;
            match global.output {
                Format::Json => json::print(&json::value("Pool", &pool)?),
                Format::Table => output::fields(&[
                    ("Name", pool.name.clone()),
                    ("Place", place(&pool)),
                    ("Fenced", fenced(&pool).to_owned()),
                    ("Created", output::time(pool.create_time)),
                    ("Etag", pool.etag.clone()),
                ]),
            }
        }
        PoolCommand::Delete { name } => {
            let request = pb::DeletePoolRequest {
                name: full(&name),
                ..Default::default()
            };
            client.delete_pool(request).await.map_err(client::failed)?;
            if !global.quiet {
                println!("pool {name} deleted");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn get(client: &mut PoolsClient<client::Channel>, name: &str) -> anyhow::Result<pb::Pool> {
    let request = pb::GetPoolRequest { name: full(name) };
    let answer = client.get_pool(request).await;
    Ok(answer.map_err(client::failed)?.into_inner())
}

/// As the API wants it.
pub(crate) fn full(name: &str) -> String {
    match name.starts_with("pools/") {
        true => name.to_owned(),
        false => format!("pools/{name}"),
    }
}

fn list(global: &Global, pools: &[pb::Pool]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        let values: anyhow::Result<Vec<_>> =
            pools.iter().map(|pool| json::value("Pool", pool)).collect();
        json::print(&values?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = pools
        .iter()
        .map(|pool| {
            vec![
                output::id(&pool.name),
                place(pool),
                fenced(pool).to_owned(),
                output::age(pool.create_time),
            ]
        })
        .collect();
    output::table(&["POOL", "PLACE", "FENCED", "AGE"], &rows);
    Ok(())
}

fn place(pool: &pb::Pool) -> String {
    match pool.spec.as_ref().and_then(|spec| spec.kind.as_ref()) {
        Some(Kind::Nbd(nbd)) => format!("nbd://{}", nbd.address),
        Some(Kind::SharedDirectory(directory)) => directory.path.clone(),
        Some(Kind::Local(_)) => "each host's own".to_owned(),
        None => "-".to_owned(),
    }
}

fn fenced(pool: &pb::Pool) -> &'static str {
    match pool.fenced {
        true => "yes",
        false => "NO",
    }
}
