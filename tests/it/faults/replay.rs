//! What a disk holds after a power cut: a model of a file system that follows a trace of `shim.c`.
//!
//! A file's data is safe after a sync of the file. A name is safe after a sync of its folder. All
//! else may be there or not. File systems promise more than that, but not the same.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use super::Random;

/// One call.
#[derive(Debug, Clone)]
pub struct Call {
    pub op: u8,
    inode: u64,
    offset: u64,
    pub path: PathBuf,
    other: PathBuf,
    data: Vec<u8>,
}

/// Reads a trace.
pub fn read_trace(bytes: &[u8]) -> Vec<Call> {
    let mut calls = Vec::new();
    let mut rest = bytes;
    while rest.len() >= 25 {
        let (head, after) = rest.split_at(25);
        let n = |range: std::ops::Range<usize>| {
            head[range].iter().rev().fold(0_u64, |n, &byte| n << 8 | u64::from(byte))
        };
        let (n_data, n_path, n_other) = (n(17..21), n(21..23), n(23..25));
        let (path, after) = after.split_at(n_path as usize);
        let (other, after) = after.split_at(n_other as usize);
        let (data, after) = after.split_at(n_data as usize);
        let path_of = |bytes: &[u8]| PathBuf::from(String::from_utf8_lossy(bytes).into_owned());
        calls.push(Call {
            op: head[0],
            inode: n(1..9),
            offset: n(9..17),
            path: path_of(path),
            other: path_of(other),
            data: data.to_vec(),
        });
        rest = after;
    }
    calls
}

/// What survives of that which was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsynced {
    /// Nothing.
    Nothing,
    /// All names, but no data: files that were not synced are as they were at their last sync, or
    /// empty.
    Names,
    /// All data, but no names.
    Data,
    /// The first changes of each folder, and some of the writes of each file.
    Some(u64),
}

/// A change that is not synced yet.
#[derive(Clone)]
enum Change {
    Name(String, Option<usize>),
    Write(u64, Vec<u8>),
    Resize(u64),
}

#[derive(Clone, Default)]
struct Node {
    is_folder: bool,
    names: BTreeMap<String, usize>,
    data: Vec<u8>,
    safe_names: BTreeMap<String, usize>,
    safe_data: Vec<u8>,
    unsynced: Vec<Change>,
}

/// The model of all files below a folder.
#[derive(Clone)]
pub struct Disk {
    root: PathBuf,
    nodes: Vec<Node>,
    /// The newest node of each inode. The system uses the number of a removed file again.
    inodes: BTreeMap<u64, usize>,
}

fn write_into(data: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + bytes.len());
    if data.len() < end {
        data.resize(end, 0);
    }
    data[start..end].copy_from_slice(bytes);
}

impl Change {
    fn apply(&self, names: &mut BTreeMap<String, usize>, data: &mut Vec<u8>) {
        match self {
            Self::Name(name, Some(node)) => {
                names.insert(name.clone(), *node);
            }
            Self::Name(name, None) => {
                names.remove(name);
            }
            Self::Write(offset, bytes) => write_into(data, *offset, bytes),
            Self::Resize(size) => data.resize(*size as usize, 0),
        }
    }
}

impl Disk {
    /// An empty folder.
    pub fn new(root: &Path) -> Self {
        let top = Node { is_folder: true, ..Node::default() };
        Self { root: root.to_owned(), nodes: vec![top], inodes: BTreeMap::new() }
    }

    /// Adds a folder or a file that is safe.
    pub fn add(&mut self, path: &Path, content: Option<&[u8]>) {
        let node = Node {
            is_folder: content.is_none(),
            data: content.unwrap_or_default().to_vec(),
            safe_data: content.unwrap_or_default().to_vec(),
            ..Node::default()
        };
        self.nodes.push(node);
        let number = self.nodes.len() - 1;
        let (folder, name) = self.place(path).expect("the folder above was added");
        self.nodes[folder].names.insert(name.clone(), number);
        self.nodes[folder].safe_names.insert(name, number);
    }

    fn find(&self, path: &Path) -> Option<usize> {
        let below = path.strip_prefix(&self.root).ok()?;
        below
            .iter()
            .try_fold(0, |node, name| self.nodes[node].names.get(&*name.to_string_lossy()).copied())
    }

    /// The folder of a path, and the name in it.
    fn place(&self, path: &Path) -> Option<(usize, String)> {
        let name = path.file_name()?.to_string_lossy().into_owned();
        Some((self.find(path.parent()?)?, name))
    }

    fn change(&mut self, node: usize, change: Change) {
        let Node { names, data, unsynced, .. } = &mut self.nodes[node];
        change.apply(names, data);
        unsynced.push(change);
    }

    fn name(&mut self, path: &Path, node: Option<usize>) {
        // A path outside of the model, like a temporary folder, does not matter.
        if let Some((folder, name)) = self.place(path) {
            self.change(folder, Change::Name(name, node));
        }
    }

    /// The node that a call on an open file means.
    fn opened(&mut self, call: &Call) -> Option<usize> {
        let known = self.inodes.get(&call.inode).copied();
        let node = known.or_else(|| self.find(&call.path))?;
        self.inodes.insert(call.inode, node);
        Some(node)
    }

    /// Follows one call.
    pub fn follow(&mut self, call: &Call) {
        match call.op {
            b'C' | b'M' => {
                let is_folder = call.op == b'M';
                self.nodes.push(Node { is_folder, ..Node::default() });
                let node = self.nodes.len() - 1;
                self.inodes.insert(call.inode, node);
                self.name(&call.path, Some(node));
            }
            b'W' => {
                if let Some(node) = self.opened(call) {
                    self.change(node, Change::Write(call.offset, call.data.clone()));
                }
            }
            b'T' => {
                if let Some(node) = self.opened(call) {
                    self.change(node, Change::Resize(call.offset));
                }
            }
            b'S' => {
                let node = if call.path == self.root { Some(0) } else { self.opened(call) };
                if let Some(node) = node {
                    let node = &mut self.nodes[node];
                    node.safe_names = node.names.clone();
                    node.safe_data = node.data.clone();
                    node.unsynced.clear();
                }
            }
            b'R' => {
                let node = self.find(&call.path);
                self.name(&call.path, None);
                self.name(&call.other, node);
            }
            b'L' => {
                let node = self.find(&call.path);
                self.name(&call.other, node);
            }
            b'U' => self.name(&call.path, None),
            other => panic!("the trace has no call {other}"),
        }
    }

    /// The disk after a power cut: its folders, and its files with their content.
    pub fn after_cut(&self, unsynced: Unsynced) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let mut random = Random(if let Unsynced::Some(seed) = unsynced { seed } else { 0 });
        let mut found = BTreeMap::new();
        let mut open = vec![(PathBuf::new(), 0)];
        while let Some((path, number)) = open.pop() {
            let (names, data) = self.nodes[number].after_cut(unsynced, &mut random);
            if self.nodes[number].is_folder {
                found.insert(path.clone(), None);
                open.extend(names.iter().map(|(name, node)| (path.join(name), *node)));
            } else {
                found.insert(path, Some(data));
            }
        }
        found
    }
}

impl Node {
    fn after_cut(
        &self,
        unsynced: Unsynced,
        random: &mut Random,
    ) -> (BTreeMap<String, usize>, Vec<u8>) {
        let (mut names, mut data) = (self.safe_names.clone(), self.safe_data.clone());
        match unsynced {
            Unsynced::Nothing => {}
            Unsynced::Names => names = self.names.clone(),
            Unsynced::Data => data = self.data.clone(),
            Unsynced::Some(_) => {
                let n_kept = random.below(self.unsynced.len() + 1);
                for (index, change) in self.unsynced.iter().enumerate() {
                    let is_kept =
                        if self.is_folder { index < n_kept } else { random.below(2) == 0 };
                    if is_kept {
                        change.apply(&mut names, &mut data);
                    }
                }
            }
        }
        (names, data)
    }
}

/// Puts files and folders below `root` into the state of the model, and leaves alone what is so.
pub fn restore(root: &Path, names: &[&str], wanted: &BTreeMap<PathBuf, Option<Vec<u8>>>) {
    for name in names {
        for path in super::look::files_below(&root.join(name)) {
            let path = Path::new(name).join(path);
            if !matches!(wanted.get(&path), Some(Some(_))) {
                fs::remove_file(root.join(&path)).unwrap();
            }
        }
        remove_empty_folders(&root.join(name));
    }
    for (path, content) in wanted {
        let place = root.join(path);
        match content {
            None => fs::create_dir_all(&place).unwrap(),
            Some(bytes) if fs::read(&place).is_ok_and(|found| found == *bytes) => {}
            Some(bytes) => fs::write(&place, bytes).unwrap(),
        }
    }
}

fn remove_empty_folders(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_empty_folders(&entry.path());
            fs::remove_dir(entry.path()).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(op: u8, inode: u64, path: &str, other: &str, data: &[u8]) -> Call {
        let [path, other] = [path, other].map(PathBuf::from);
        Call { op, inode, offset: 0, path, other, data: data.to_vec() }
    }

    fn disk(calls: &[Call]) -> Disk {
        let mut disk = Disk::new(Path::new("/r"));
        disk.add(Path::new("/r/f"), None);
        disk.add(Path::new("/r/f/old"), Some(b"1"));
        calls.iter().for_each(|call| disk.follow(call));
        disk
    }

    fn content(disk: &Disk, unsynced: Unsynced, path: &str) -> Option<Vec<u8>> {
        disk.after_cut(unsynced).remove(Path::new(path)).flatten()
    }

    #[test]
    fn only_a_sync_of_file_and_folder_makes_a_replacement_safe() {
        let write = [call(b'C', 7, "/r/f/new", "", b""), call(b'W', 7, "/r/f/new", "", b"2")];
        let rename = call(b'R', 0, "/r/f/new", "/r/f/old", b"");
        let [file, folder] =
            [(7, "/r/f/new"), (8, "/r/f")].map(|(n, at)| call(b'S', n, at, "", b""));
        let all = |calls: &[&Call]| {
            let calls: Vec<Call> = write.iter().chain(calls.iter().copied()).cloned().collect();
            disk(&calls)
        };

        let hasty = all(&[&rename]);
        assert_eq!(content(&hasty, Unsynced::Nothing, "f/old").unwrap(), b"1");
        assert_eq!(content(&hasty, Unsynced::Names, "f/old").unwrap(), b"", "the name came first");

        let careful = all(&[&file, &rename, &folder]);
        for unsynced in [Unsynced::Nothing, Unsynced::Names, Unsynced::Some(3)] {
            assert_eq!(content(&careful, unsynced, "f/old").unwrap(), b"2");
            assert_eq!(content(&careful, unsynced, "f/new"), None);
        }
    }

    #[test]
    fn a_file_that_is_removed_comes_back_until_its_folder_is_synced() {
        let remove = call(b'U', 0, "/r/f/old", "", b"");
        let removed = disk(std::slice::from_ref(&remove));
        assert_eq!(content(&removed, Unsynced::Nothing, "f/old").unwrap(), b"1");
        let synced = disk(&[remove, call(b'S', 8, "/r/f", "", b"")]);
        assert_eq!(content(&synced, Unsynced::Nothing, "f/old"), None);
    }
}
