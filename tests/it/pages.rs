//! The pages answer whatever their clients do, and whatever the daemon runs out of.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::support::{Site, scan_bytes, skip};

/// Lets this process open so many files, if the system permits.
fn may_open(n_files: u64) -> bool {
    let limit = getrlimit(Resource::Nofile);
    let is_enough = |limit: Option<u64>| limit.is_none_or(|limit| limit >= n_files);
    is_enough(limit.current)
        || is_enough(limit.maximum)
            && setrlimit(Resource::Nofile, Rlimit { current: Some(n_files), ..limit }).is_ok()
}

#[test]
fn idle_connections_neither_stop_the_daemon_nor_keep_others_from_its_pages() {
    const N_IDLE: usize = 1500;
    if !may_open(2 * N_IDLE as u64) {
        return skip("this process may not open enough connections");
    }
    let mut site = Site::new(2, &[]);
    site.start();
    // The usual limit of a process.
    site.limit_files(1024);
    let idle: Vec<TcpStream> =
        (0..N_IDLE).map(|_| TcpStream::connect(site.address).unwrap()).collect();

    let asked = Instant::now();
    assert_eq!(site.get("/readyz").as_deref(), Some("ready\n"));
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    assert!(site.metric("process_open_fds") < 200.0);
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.wait("accepted", |site| site.status().n_accepted == 1);
    drop(idle);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_daemon_without_free_file_handles_answers_when_it_has_some_again() {
    let mut site = Site::new(2, &[]);
    site.start();
    site.limit_files(3);
    let mut waiting = TcpStream::connect(site.address).unwrap();
    waiting.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    site.wait("out of handles", |site| site.log().contains("cannot accept a connection"));
    site.limit_files(1024);
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    site.wait("ready again", |site| site.get("/readyz").unwrap() == "ready\n");
    assert_eq!(site.stop(), Some(0));
}

/// Reads until the daemon closes the connection. Returns how long that took.
fn wait_until_closed(mut stream: TcpStream) -> Duration {
    let started = Instant::now();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let ended = stream.read_to_end(&mut Vec::new());
    let is_timeout = |kind| [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&kind);
    assert!(!ended.is_err_and(|error| is_timeout(error.kind())), "still open");
    started.elapsed()
}

#[test]
fn a_client_that_says_nothing_or_never_ends_its_request_is_cut_off() {
    let mut site = Site::new(2, &[]);
    site.start();
    let silent = TcpStream::connect(site.address).unwrap();
    let slow = TcpStream::connect(site.address).unwrap();
    let mut sender = slow.try_clone().unwrap();
    let sending = thread::spawn(move || {
        sender.write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\nX-Slow: ").unwrap();
        // A byte at a time, for as long as the daemon listens.
        while sender.write_all(b"a").is_ok() {
            thread::sleep(Duration::from_millis(200));
        }
    });
    for stream in [silent, slow] {
        let took = wait_until_closed(stream);
        assert!(took < Duration::from_secs(20), "{took:?}");
    }
    sending.join().unwrap();
    assert_eq!(site.get("/readyz").as_deref(), Some("ready\n"));
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_request_with_a_body_is_refused_and_no_connection_is_kept() {
    let mut site = Site::new(2, &[]);
    site.start();
    let answer = |head: &str| {
        let mut stream = TcpStream::connect(site.address).unwrap();
        stream
            .write_all(format!("GET /readyz HTTP/1.1\r\nHost: x\r\n{head}\r\n").as_bytes())
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let page = answer("");
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("connection: close"), "{page}");
    for head in ["Content-Length: 1000000000\r\n", "Transfer-Encoding: chunked\r\n"] {
        let refused = answer(head);
        assert!(refused.starts_with("HTTP/1.1 413"), "{head}: {refused}");
    }
    let long = answer(&format!("X-Long: {}\r\n", "a".repeat(12_000)));
    assert!(long.starts_with("HTTP/1.1 200"), "{long}");
    assert_eq!(site.stop(), Some(0));
}
