//! What a disk holds after a power cut: a model of a file system that follows a trace of `shim.c`.
//!
//! A file's data is safe after a sync of the file. A name is safe after a sync of its folder, which
//! makes the names of the folders above it safe, too. A rename happens in both folders or in none.
//! All else may be there or not. File systems promise more than that, but not the same.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
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
    /// The first changes of names, and some of the writes of each file.
    Some(u64),
}

/// A write that is not synced yet.
#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Resize(u64),
}

/// One call that changed names, in one folder or in two.
#[derive(Clone)]
struct Renaming {
    /// Folder, name, and what has the name from now on.
    names: Vec<(usize, String, Option<usize>)>,
    is_safe: bool,
}

#[derive(Clone, Default)]
struct Node {
    is_folder: bool,
    names: BTreeMap<String, usize>,
    data: Vec<u8>,
    safe_data: Vec<u8>,
    unsynced: Vec<Change>,
}

/// The model of all files below a folder.
#[derive(Clone)]
pub struct Disk {
    root: PathBuf,
    nodes: Vec<Node>,
    renamings: Vec<Renaming>,
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
    fn apply(&self, data: &mut Vec<u8>) {
        match self {
            Self::Write(offset, bytes) => write_into(data, *offset, bytes),
            Self::Resize(size) => data.resize(*size as usize, 0),
        }
    }
}

impl Disk {
    /// An empty folder.
    pub fn new(root: &Path) -> Self {
        let top = Node { is_folder: true, ..Node::default() };
        let (renamings, inodes) = (Vec::new(), BTreeMap::new());
        Self { root: root.to_owned(), nodes: vec![top], renamings, inodes }
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
        self.rename(vec![(folder, name, Some(number))], true);
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
        change.apply(&mut self.nodes[node].data);
        self.nodes[node].unsynced.push(change);
    }

    fn rename(&mut self, names: Vec<(usize, String, Option<usize>)>, is_safe: bool) {
        for (folder, name, node) in &names {
            give_name(&mut self.nodes[*folder].names, name, *node);
        }
        self.renamings.push(Renaming { names, is_safe });
    }

    /// Gives names. A path outside of the model, like a temporary folder, does not matter.
    fn name(&mut self, names: [Option<(&Path, Option<usize>)>; 2]) {
        let place = |(path, node): (&Path, Option<usize>)| {
            let (folder, name) = self.place(path)?;
            Some((folder, name, node))
        };
        let names: Vec<_> = names.into_iter().flatten().filter_map(place).collect();
        self.rename(names, false);
    }

    /// Makes all names in a folder safe, and the names of the folders that lead to them.
    fn sync_names(&mut self, synced: usize) {
        let mut leading = vec![synced];
        for renaming in &mut self.renamings {
            if !renaming.is_safe && renaming.names.iter().any(|(folder, ..)| *folder == synced) {
                renaming.is_safe = true;
                leading.extend(renaming.names.iter().map(|(folder, ..)| *folder));
            }
        }
        while let Some(folder) = leading.pop() {
            for renaming in self.renamings.iter_mut().filter(|renaming| !renaming.is_safe) {
                if renaming.names.iter().any(|(.., node)| *node == Some(folder)) {
                    renaming.is_safe = true;
                    leading.extend(renaming.names.iter().map(|(above, ..)| *above));
                }
            }
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
                self.name([Some((&call.path, Some(node))), None]);
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
                    self.sync_names(node);
                    let node = &mut self.nodes[node];
                    node.safe_data = node.data.clone();
                    node.unsynced.clear();
                }
            }
            b'R' => {
                let node = self.find(&call.path);
                self.name([Some((&call.path, None)), Some((&call.other, node))]);
            }
            b'L' => {
                let node = self.find(&call.path);
                self.name([Some((&call.other, node)), None]);
            }
            b'U' => self.name([Some((&call.path, None)), None]),
            other => panic!("the trace has no call {other}"),
        }
    }

    /// The disk after a power cut: its folders, and its files with their content.
    pub fn after_cut(&self, unsynced: Unsynced) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let mut random = Random(if let Unsynced::Some(seed) = unsynced { seed } else { 0 });
        let names = self.names_after_cut(unsynced, &mut random);
        let mut found = BTreeMap::new();
        let mut open = vec![(PathBuf::new(), 0)];
        while let Some((path, number)) = open.pop() {
            if self.nodes[number].is_folder {
                found.insert(path.clone(), None);
                open.extend(names[number].iter().map(|(name, node)| (path.join(name), *node)));
            } else {
                found.insert(path, Some(self.nodes[number].after_cut(unsynced, &mut random)));
            }
        }
        found
    }

    /// The names in each folder.
    fn names_after_cut(
        &self,
        unsynced: Unsynced,
        random: &mut Random,
    ) -> Vec<BTreeMap<String, usize>> {
        let n_unsafe = self.renamings.iter().filter(|renaming| !renaming.is_safe).count();
        let mut n_kept = match unsynced {
            Unsynced::Nothing | Unsynced::Data => 0,
            Unsynced::Names => n_unsafe,
            Unsynced::Some(_) => random.below(n_unsafe + 1),
        };
        let mut names = vec![BTreeMap::new(); self.nodes.len()];
        for Renaming { names: changed, is_safe } in &self.renamings {
            if !is_safe && n_kept == 0 {
                continue;
            }
            n_kept -= usize::from(!is_safe);
            for (folder, name, node) in changed {
                give_name(&mut names[*folder], name, *node);
            }
        }
        names
    }
}

fn give_name(names: &mut BTreeMap<String, usize>, name: &str, node: Option<usize>) {
    match node {
        Some(node) => drop(names.insert(name.to_owned(), node)),
        None => drop(names.remove(name)),
    }
}

impl Node {
    fn after_cut(&self, unsynced: Unsynced, random: &mut Random) -> Vec<u8> {
        let mut data = self.safe_data.clone();
        match unsynced {
            Unsynced::Nothing | Unsynced::Names => {}
            Unsynced::Data => data.clone_from(&self.data),
            Unsynced::Some(_) => {
                for change in &self.unsynced {
                    if random.below(2) == 0 {
                        change.apply(&mut data);
                    }
                }
            }
        }
        data
    }
}

/// The time of all files of a story: what a rename keeps must be the same after a cut.
pub fn one_time() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600)
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
            Some(bytes) => {
                fs::write(&place, bytes).unwrap();
                let file = fs::File::options().append(true).open(&place).unwrap();
                file.set_modified(one_time()).unwrap();
            }
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
    fn a_rename_between_folders_happens_in_both_or_in_none() {
        let into = [call(b'M', 9, "/r/g", "", b""), call(b'R', 0, "/r/f/old", "/r/g/new", b"")];
        for folder in ["/r/f", "/r/g"] {
            let number = if folder == "/r/f" { 8 } else { 9 };
            let calls = [&into[..], &[call(b'S', number, folder, "", b"")]].concat();
            let moved = disk(&calls);
            assert_eq!(content(&moved, Unsynced::Nothing, "f/old"), None, "{folder} is synced");
            assert_eq!(content(&moved, Unsynced::Nothing, "g/new").unwrap(), b"1", "{folder}");
        }
        assert_eq!(content(&disk(&into), Unsynced::Nothing, "f/old").unwrap(), b"1");
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
