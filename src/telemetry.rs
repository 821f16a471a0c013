//! The daemon's output: log lines to the journal or stderr, and HTTP pages on loopback.

mod connections;

use std::{io::IsTerminal, net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Json},
    routing::get,
};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    EnvFilter, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

use crate::{domain::not_ready::NotReady, metrics, pipeline::Shared};

/// Changes the log filter while the daemon runs.
pub type LogHandle = reload::Handle<EnvFilter, Registry>;

/// Starts logging: to the journal under systemd, else to stderr. `RUST_LOG` overrides `filter`.
pub fn start_logging(filter: &str) -> LogHandle {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| of_settings(filter));
    let (filter, handle) = reload::Layer::new(filter);

    let registry = tracing_subscriber::registry().with(filter);
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    match journal {
        Some(journal) => registry.with(journal).try_init(),
        None => {
            let stderr = tracing_subscriber::fmt::layer()
                // A line that cannot be written is lost. An error message on stderr would panic.
                .log_internal_errors(false)
                .with_writer(std::io::stderr);
            let colours = std::io::stderr().is_terminal();
            registry.with(stderr.with_target(false).with_ansi(colours)).try_init()
        }
    }
    // It fails only in tests, where a subscriber exists already.
    .ok();
    handle
}

/// Sets another filter, unless `RUST_LOG` is set.
pub fn change_filter(handle: &LogHandle, filter: &str) {
    if std::env::var_os("RUST_LOG").is_none() {
        handle.reload(of_settings(filter)).ok();
    }
}

/// A level without a module applies to oddscan only: libraries write thousands of lines at `debug`.
fn of_settings(filter: &str) -> EnvFilter {
    match filter.trim().parse::<LevelFilter>() {
        Ok(level) => EnvFilter::new(format!("{},oddscan={level}", level.min(LevelFilter::WARN))),
        Err(_) => EnvFilter::new(filter),
    }
}

/// Binds the pages' address.
///
/// # Errors
/// If another process uses the address, or this machine does not have it.
pub async fn bind(address: SocketAddr) -> std::io::Result<tokio::net::TcpListener> {
    tokio::net::TcpListener::bind(address).await
}

/// Serves `/metrics`, `/healthz`, `/readyz` and `/status.json` for as long as it is polled.
pub async fn serve(listener: tokio::net::TcpListener, shared: Arc<Shared>) {
    let pages = Router::new()
        .route("/metrics", get(metrics_page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready_page))
        .route("/status.json", get(status_page))
        .with_state(shared);
    connections::serve(listener, pages).await;
}

async fn metrics_page(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    // Updated here, so that the page and `/readyz` always agree.
    let status = shared.board.status();
    shared.metrics.ready(status.ready);
    for reason in NotReady::ALL {
        shared.metrics.not_ready(reason, status.has(reason));
    }
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], shared.metrics.render())
}

async fn ready_page(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let status = shared.board.status();
    if status.ready {
        return (StatusCode::OK, "ready\n".to_owned());
    }
    let reasons: Vec<String> = status.reasons.into_iter().collect();
    (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", reasons.join("; ")))
}

async fn status_page(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    Json(shared.board.status())
}
