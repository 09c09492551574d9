//! `healthcheck`: for containers, which have no curl.

use serde_json::Value;

use super::{
    Failure, SettingsArgs,
    client::{ClientArgs, RequestError},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    client: ClientArgs,
    /// Asks whether it is ready (every source and handler up), not only whether it is alive
    #[arg(long)]
    ready: bool,
}

pub(super) async fn run(settings: &SettingsArgs, args: Args) -> Result<(), Failure> {
    let client = args.client.client(settings)?;
    let path = if args.ready { "readyz" } else { "healthz" };
    match client.get::<Value>(&[path], &[]).await {
        // Any success is one, whatever stands in it.
        Ok(_) | Err(RequestError::Strange { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
