//! Reads tensors from PyTorch's `.pth` and TorchScript's `.pt`: zip archives with a pickle and raw
//! storages.
//!
//! A pickle is a program that may call anything. This reader knows only the instructions for a
//! dictionary of tensors and for TorchScript's modules, which are dictionaries of tensors and
//! modules. It refuses every other instruction and name, and executes nothing. The code of a
//! TorchScript archive is not read at all.

mod machine;

use std::{collections::HashMap, io::Cursor};

use zip::{CompressionMethod, ZipArchive};

use self::machine::{MAX_AXES, Machine, View};
use super::tensor::{Tensor, Tensors};

/// Limit on the pickle. The pickle of a large network has 200 kB. One of this size takes up to half
/// a gigabyte as values.
const MAX_PICKLE_BYTES: usize = 4 << 20;
/// Limit on the bytes that are read and made, as a multiple of the file's size. A file in f16 is
/// read once and becomes twice its size. A little more lets names share a tensor.
const MAX_FILES_WORTH: usize = 4;

const SAVE_LESS: &str = "save the network's state_dict() alone, each tensor under one name";

type Archive<'a> = ZipArchive<Cursor<&'a [u8]>>;

/// All tensors of the dictionary or the module in the file, by name.
pub(super) fn tensors(bytes: &[u8]) -> Result<Tensors, String> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| format!("its zip: {e}"))?;
    let description = archive.file_names().find(|name| name.ends_with("/data.pkl"));
    let description = description
        .map(str::to_owned)
        .ok_or("it holds no data.pkl; save it again with PyTorch 1.6 or newer")?;
    let folder = description.trim_end_matches("data.pkl").to_owned();

    let pickle = entry(&mut archive, bytes, &description)?;
    if pickle.len() > MAX_PICKLE_BYTES {
        let found = pickle.len();
        return Err(format!(
            "its description has {found} bytes, at most {MAX_PICKLE_BYTES} are read; {SAVE_LESS}"
        ));
    }

    let mut machine = Machine::default();
    let top = machine.run(pickle)?;
    let named = machine.named_tensors(top)?;

    let mut reader = Storages { archive, bytes, folder, read: HashMap::new(), n_bytes_done: 0 };
    let mut tensors = Tensors::new();
    for (name, arguments) in named {
        let view = machine
            .view(arguments)
            .ok_or_else(|| format!("{name} is described wrongly, or has over {MAX_AXES} axes"))?;
        let tensor = reader.tensor(&name, &view)?;
        tensors.insert(name.strip_prefix("backbone.").unwrap_or(&name).to_owned(), tensor);
    }
    Ok(tensors)
}

/// An entry of the archive. PyTorch does not compress entries, so each is a part of the file.
fn entry<'a>(archive: &mut Archive<'a>, bytes: &'a [u8], name: &str) -> Result<&'a [u8], String> {
    let file = archive.by_name(name).map_err(|error| format!("{name}: {error}"))?;
    if file.compression() != CompressionMethod::Stored {
        return Err(format!("{name} is compressed; PyTorch stores its entries as they are"));
    }

    let part = || {
        let start = usize::try_from(file.data_start()?).ok()?;
        bytes.get(start..)?.get(..usize::try_from(file.compressed_size()).ok()?)
    };
    let part = part().ok_or_else(|| format!("{name} reaches beyond the end of the file"))?;

    let (found, needed) = (crc32fast::hash(part), file.crc32());
    if found != needed {
        return Err(format!(
            "{name} has the checksum {found:08x}, {needed:08x} is needed; the file is damaged"
        ));
    }
    Ok(part)
}

struct Storages<'a> {
    archive: Archive<'a>,
    bytes: &'a [u8],
    folder: String,
    read: HashMap<&'a str, &'a [u8]>,
    /// Bytes read and made so far.
    n_bytes_done: usize,
}

impl<'a> Storages<'a> {
    fn tensor(&mut self, name: &str, view: &View<'a>) -> Result<Tensor, String> {
        let storage = self.storage(view.key)?;
        let n_values = view.shape.iter().try_fold(1_usize, |n, &extent| n.checked_mul(extent));
        // A stride of 0 would let a small storage claim a tensor of any size.
        let n_values = n_values
            .filter(|&n| n <= storage.len() / view.number.n_bytes())
            .ok_or_else(|| format!("{name} of shape {:?} exceeds its storage", view.shape))?;
        self.spend(n_values * size_of::<f32>())?;

        let mut values = Vec::with_capacity(n_values);
        for index in 0..n_values {
            let place = view.place(index).and_then(|place| {
                let start = place.checked_mul(view.number.n_bytes())?;
                storage.get(start..start.checked_add(view.number.n_bytes())?)
            });
            let bytes = place.ok_or_else(|| format!("{name} reaches beyond its storage"))?;
            values.push(view.number.read(bytes));
        }
        Ok(Tensor { shape: view.shape.clone(), values })
    }

    fn storage(&mut self, key: &'a str) -> Result<&'a [u8], String> {
        if let Some(storage) = self.read.get(key) {
            return Ok(storage);
        }
        let storage = entry(&mut self.archive, self.bytes, &format!("{}data/{key}", self.folder))?;
        self.spend(storage.len())?;
        self.read.insert(key, storage);
        Ok(storage)
    }

    /// Counts bytes against the limit. Entries can overlap and names can share a tensor. So without
    /// a limit, a small file could ask for any amount of work and memory.
    fn spend(&mut self, n_bytes: usize) -> Result<(), String> {
        self.n_bytes_done += n_bytes;
        let (found, most) = (self.n_bytes_done, MAX_FILES_WORTH * self.bytes.len());
        if found > most {
            return Err(format!(
                "its tensors need {found} bytes or more, at most {most} bytes are made of a file \
                 of its size; {SAVE_LESS}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use zip::{ZipWriter, write::SimpleFileOptions};

    /// An archive like those of `torch.save`.
    fn archive(pickle: &[u8], storages: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        zip.start_file("net/data.pkl", options).unwrap();
        zip.write_all(pickle).unwrap();
        for (key, bytes) in storages {
            zip.start_file(format!("net/data/{key}"), options).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn text(text: &str) -> Vec<u8> {
        [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn sizes(sizes: &[u8]) -> Vec<u8> {
        let numbers = sizes.iter().flat_map(|&size| [b'K', size]);
        b"(".iter().copied().chain(numbers).chain(*b"t").collect()
    }

    /// A view of the storage `key` with `shape` and `strides` from `offset`.
    fn tensor(kind: &str, key: &str, offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
        let mut pickle = b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
        pickle.extend([text("storage"), format!("ctorch\n{kind}\n").into()].concat());
        pickle.extend([text(key), text("cpu"), b"K\x06tQ".to_vec()].concat());
        pickle.extend([vec![b'K', offset], sizes(shape), sizes(strides)].concat());
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        pickle
    }

    /// An ordered dictionary, with memo 1, of values that are already in the pickle's form.
    fn dictionary(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let entries = entries.iter().flat_map(|(name, value)| [text(name), value.clone()].concat());
        let start = b"ccollections\nOrderedDict\n)Rq\x01(".iter().copied();
        start.chain(entries).chain(*b"u").collect()
    }

    /// The output of `torch.save` for a dictionary.
    fn saved(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
        [b"\x80\x02", &dictionary(entries)[..], b"}b."].concat()
    }

    /// The output of `torch.save({"w": tensor})`.
    fn one_tensor(kind: &str, offset: u8, shape: [u8; 2], strides: [u8; 2]) -> Vec<u8> {
        saved(&[("w", tensor(kind, "0", offset, &shape, &strides))])
    }

    /// One value of a storage.
    fn scalar(key: &str) -> Vec<u8> {
        tensor("FloatStorage", key, 0, &[1], &[1])
    }

    #[test]
    fn a_view_of_a_storage_is_read_by_offset_and_strides() {
        let storage = floats(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let read = |offset, shape, strides| {
            let pickle = one_tensor("FloatStorage", offset, shape, strides);
            tensors(&archive(&pickle, &[("0", storage.clone())]))
                .map(|mut t| t.remove("w").unwrap())
        };
        assert_eq!(read(0, [2, 3], [3, 1]).unwrap().values, [0., 1., 2., 3., 4., 5.]);
        assert_eq!(read(0, [3, 2], [1, 3]).unwrap().values, [0., 3., 1., 4., 2., 5.]);
        assert_eq!(read(2, [1, 2], [2, 1]).unwrap().values, [2., 3.]);
        assert!(read(3, [2, 3], [3, 1]).unwrap_err().contains("beyond its storage"));
        assert!(read(0, [200, 200], [0, 0]).unwrap_err().contains("exceeds its storage"));
    }

    #[test]
    fn half_precision_becomes_single() {
        for (kind, bytes) in [
            ("HalfStorage", [f16::from_f32(1.5).to_le_bytes(), f16::from_f32(-2.0).to_le_bytes()]),
            (
                "BFloat16Storage",
                [bf16::from_f32(1.5).to_le_bytes(), bf16::from_f32(-2.0).to_le_bytes()],
            ),
        ] {
            let pickle = one_tensor(kind, 0, [1, 2], [2, 1]);
            let read = tensors(&archive(&pickle, &[("0", bytes.concat())])).unwrap();
            assert_eq!(read["w"].values, [1.5, -2.0]);
        }
    }

    #[test]
    fn a_pickle_that_would_run_something_is_refused_by_name() {
        let pickle = b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.";
        let error = tensors(&archive(pickle, &[])).unwrap_err();
        assert!(error.contains("os.system") && error.contains("nothing is executed"), "{error}");
    }

    #[test]
    fn what_nests_without_end_does_no_harm() {
        let pickle = [b"\x80\x02)", &[0x85; 1_000_000][..], b"."].concat();
        assert!(tensors(&archive(&pickle, &[])).unwrap_err().contains("no dictionary"));
    }

    #[test]
    fn a_value_in_the_place_of_a_name_is_named_by_its_kind_only() {
        // Ten levels of tuples, each with four times the last one: a million values if printed.
        let tuples = b"(h\x00h\x00h\x00h\x00tq\x00".repeat(10);
        let pickle = [b"\x80\x02)q\x00", &tuples[..], b"\x93."].concat();
        let error = tensors(&archive(&pickle, &[])).unwrap_err();
        let wanted = "a tuple stands where a name is needed";
        assert!(error == wanted, "{} bytes: {error:.80}", error.len());
    }

    #[test]
    fn a_dictionary_that_two_names_hold_is_the_same_for_both() {
        let network = dictionary(&[("w", scalar("0"))]);
        let recalled = b"h\x01".to_vec();
        let entries = [text("model"), network, text("state_dict"), recalled].concat();
        let pickle = [b"\x80\x02}(", &entries[..], b"u."].concat();
        let read = tensors(&archive(&pickle, &[("0", floats(&[1.5]))])).unwrap();
        assert_eq!(read["w"].values, [1.5]);
    }

    #[test]
    fn a_dictionary_that_holds_itself_is_read_once() {
        let pickle = saved(&[("model", b"h\x01".to_vec()), ("w", scalar("0"))]);
        let read = tensors(&archive(&pickle, &[("0", floats(&[1.5]))])).unwrap();
        assert_eq!(read.keys().collect::<Vec<_>>(), ["w"]);
    }

    /// The output of `torch.jit.save` for a module of values that are already in the pickle's form.
    fn module(class: &str, entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let entries = entries.iter().flat_map(|(name, value)| [text(name), value.clone()].concat());
        let start =
            format!("c__torch__{class}\n)\u{81}").chars().map(|c| c as u8).collect::<Vec<_>>();
        start.into_iter().chain(*b"}(").chain(entries).chain(*b"ub").collect()
    }

    fn script(top: Vec<u8>) -> Vec<u8> {
        [b"\x80\x02", &top[..], b"."].concat()
    }

    #[test]
    fn modules_of_torchscript_are_dictionaries_within_dictionaries() {
        let inner = module(
            ".torch.nn.modules.conv\nConv3d",
            &[("training", b"\x89".to_vec()), ("weight", scalar("1")), ("bias", b"N".to_vec())],
        );
        let top = module("\nNet", &[("scale", scalar("0")), ("first", inner)]);
        let storages = [("0", floats(&[0.5])), ("1", floats(&[2.5]))];
        let read = tensors(&archive(&script(top), &storages)).unwrap();
        let found: Vec<_> = read.iter().map(|(name, t)| (&name[..], t.values[0])).collect();
        assert_eq!(found, [("first.weight", 2.5), ("scale", 0.5)]);
    }

    #[test]
    fn modules_are_inert_and_nothing_else_is_made_or_built() {
        let refused = |top: &[u8]| tensors(&archive(&script(top.to_vec()), &[])).unwrap_err();
        assert!(refused(b"cos\nsystem\n)\x81}b").contains("os.system"));
        assert!(refused(b"c__torch___evil\nNet\n)\x81}b").contains("__torch___evil.Net"));
        assert!(refused(b"c__torch__\nNet\n)R").contains("class is called"));
        assert!(refused(b"ccollections\nOrderedDict\n)\x81}b").contains("a module's class"));
        assert!(refused(b"c__torch__\nNet\n)\x81)b").contains("built with a tuple"));
    }

    #[test]
    fn modules_that_hold_themselves_or_one_another_without_end_are_refused() {
        let refused = |top: &[u8]| tensors(&archive(&script(top.to_vec()), &[])).unwrap_err();
        let own = [b"c__torch__\nNet\n)\x81q\x01}", &text("a")[..], b"h\x01sb"].concat();
        assert!(refused(&own).contains("16 deep"));
        // Each of 14 modules holds its predecessor twice.
        let mut twice = b"c__torch__\nNet\n)\x81q\x01".to_vec();
        for _ in 0..14 {
            let entries = [text("a"), b"h\x01".to_vec(), text("b"), b"h\x01".to_vec()].concat();
            twice.extend([b"c__torch__\nNet\n)\x81}(", &entries[..], b"ubq\x01"].concat());
        }
        assert!(refused(&twice).contains("more than 4096"));
        let long = module("\nNet", &[(&"n".repeat(600), scalar("0"))]);
        assert!(refused(&long).contains("512 bytes"));
    }

    #[test]
    fn names_that_share_a_tensor_cannot_multiply_it() {
        let names: Vec<String> = (0..100).map(|n| format!("w{n}")).collect();
        let shared =
            [&tensor("FloatStorage", "0", 0, &[10, 100], &[100, 1])[..], b"q\x02"].concat();
        let value = |n| if n == 0 { shared.clone() } else { b"h\x02".to_vec() };
        let file = |n_names: usize| {
            let names = names[..n_names].iter().map(String::as_str).enumerate();
            let pickle = saved(&names.map(|(n, name)| (name, value(n))).collect::<Vec<_>>());
            archive(&pickle, &[("0", floats(&[0.5; 1000]))])
        };
        assert_eq!(tensors(&file(2)).unwrap().len(), 2);
        let error = tensors(&file(100)).unwrap_err();
        assert!(error.contains(&format!("at most {} bytes", 4 * file(100).len())), "{error}");
    }

    #[test]
    fn entries_of_the_archive_that_overlap_cannot_multiply_it() {
        let keys: Vec<String> = (0..100).map(|n| n.to_string()).collect();
        let entries: Vec<_> = keys.iter().map(|key| (&key[..], scalar(key))).collect();
        let file = archive(&saved(&entries), &[("0", vec![0; 100_000])]);
        let mut zip = ZipWriter::new_append(Cursor::new(file)).unwrap();
        for key in &keys[1..] {
            zip.shallow_copy_file("net/data/0", &format!("net/data/{key}")).unwrap();
        }
        let file = zip.finish().unwrap().into_inner();
        let error = tensors(&file).unwrap_err();
        assert!(error.contains(&format!("at most {} bytes", 4 * file.len())), "{error}");
    }

    #[test]
    fn a_shape_of_many_axes_is_refused() {
        let pickle = saved(&[("w", tensor("FloatStorage", "0", 0, &[1; 9], &[1; 9]))]);
        let error = tensors(&archive(&pickle, &[("0", floats(&[0.0]))])).unwrap_err();
        assert!(error.contains("w is described wrongly"), "{error}");
    }

    #[test]
    fn a_damaged_storage_is_refused() {
        let mut file = archive(&saved(&[("w", scalar("0"))]), &[("0", floats(&[1234.5]))]);
        let value = file.windows(4).position(|bytes| bytes == 1234.5_f32.to_le_bytes()).unwrap();
        file[value] ^= 1;
        assert!(tensors(&file).unwrap_err().to_lowercase().contains("checksum"));
    }

    #[test]
    fn other_archives_and_missing_storages_are_errors() {
        assert!(tensors(b"PK\x03\x04 and so on").unwrap_err().contains("zip"));
        let pickle = one_tensor("FloatStorage", 0, [1, 2], [2, 1]);
        assert!(tensors(&archive(&pickle, &[])).unwrap_err().contains("net/data/0"));
        assert!(tensors(&archive(b"\x80\x02K\x01.", &[])).unwrap_err().contains("no dictionary"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_value_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            Machine::default().run(&bytes).ok();
        }

        #[test]
        fn a_damaged_module_is_read_or_refused(place in 0_usize..300, value in any::<u8>()) {
            let inner = module("\nInner", &[("weight", scalar("0"))]);
            let mut pickle = script(module("\nNet", &[("first", inner)]));
            let place = place % pickle.len();
            pickle[place] = value;
            tensors(&archive(&pickle, &[("0", floats(&[0.0]))])).ok();
        }

        #[test]
        fn a_damaged_description_is_read_or_refused(place in 0_usize..200, value in any::<u8>()) {
            let mut pickle = one_tensor("FloatStorage", 0, [2, 3], [3, 1]);
            let place = place % pickle.len();
            pickle[place] = value;
            tensors(&archive(&pickle, &[("0", floats(&[0.0; 6]))])).ok();
        }
    }
}
