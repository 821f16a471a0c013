//! The connections of the pages: each has one request and little time, and their number is limited.
//!
//! Every open connection takes a file handle, and a daemon without handles stops. Therefore no
//! client can hold many, whatever it sends or leaves out.

use std::{collections::VecDeque, time::Duration};

use axum::{
    Router,
    body::HttpBody,
    extract::Request,
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

/// Connections that are open at the same time. Prometheus, an agent and a few people need ten.
const MAX_OPEN: usize = 64;

/// A connection is closed after this time, whether it has sent its request and read the page or
/// not. A page takes milliseconds.
const MAX_TIME: Duration = Duration::from_secs(10);

/// A request has no more bytes before its body.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// After a failed accept the next one waits: without free file handles it would fail at once.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

/// Serves the pages for as long as it is polled.
pub(super) async fn serve(listener: TcpListener, pages: Router) {
    let pages = pages.layer(middleware::from_fn(refuse_bodies));
    let mut open = Open::default();
    let mut has_failed = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                has_failed = false;
                open.add(stream, pages.clone()).await;
            }
            Err(error) => {
                if !has_failed {
                    warn!(%error, "the pages cannot accept a connection; trying again");
                }
                has_failed = true;
                sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// The open connections, the oldest first.
#[derive(Default)]
struct Open(VecDeque<JoinHandle<()>>);

impl Open {
    /// Serves one more connection. If there are too many, the oldest is closed. A client that wants
    /// a page has it within milliseconds, so the oldest is most likely idle. Idle connections would
    /// shut out everybody else if new ones had to wait.
    async fn add(&mut self, stream: TcpStream, pages: Router) {
        self.0.retain(|connection| !connection.is_finished());
        if self.0.len() >= MAX_OPEN
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.abort();
            // Its file handle is free after this. The error only says that it was aborted.
            oldest.await.ok();
        }
        self.0.push_back(tokio::spawn(serve_one(stream, pages)));
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// Answers the one request of a connection.
async fn serve_one(stream: TcpStream, pages: Router) {
    let service = TowerToHyperService::new(pages);
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(MAX_TIME, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "a connection to the pages failed"),
        Err(_) => debug!("a connection to the pages was closed: it took too long"),
    }
}

/// No page takes a body, so that a request with one is refused before any of it is read.
async fn refuse_bodies(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        next.run(request).await
    } else {
        StatusCode::PAYLOAD_TOO_LARGE.into_response()
    }
}
