"""DICOM series of every kind, written with pydicom, and a check of what was made of them.

    dicom_series.py make FOLDER            FOLDER/<case>/..., and the volumes in FOLDER/_truth
    dicom_series.py check FOLDER OUT       OUT/<case>/*.nii.gz against the truth, and against dcm2niix
                                           where that is installed
    dicom_series.py equal FIRST SECOND     two volumes: the same value at the same place
    dicom_series.py from SCAN FOLDER       a NIfTI scan, rounded, as three series, sliced along each of its
                                           axes, and as FOLDER.nii.gz
    dicom_series.py turn FILE OTHER        a copy of a slice, in another direction
    dicom_series.py rename FILE OTHER      a copy of a slice under another SOPInstanceUID
    dicom_series.py brain FOLDER SEED ID   a series of a made-up brain that the daemon takes for one, with
                                           this PatientID
"""

import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from zlib import crc32

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

# Columns, rows, slices: all different, so that swapped axes show. JPEG 2000 needs 32 pixels.
SHAPE = (36, 44, 11)
SPACING = (0.9, 1.1, 2.5)

# Cases about the kind of image: what the header says beside the times of an MPRAGE, and the suffix.
NAMED = {
    "named-mpr": ({"SeriesDescription": "t1_mpr_sag_p2_iso", "ProtocolName": "t1_mpr"}, "T1w"),
    "named-denied": ({"ContrastBolusAgent": "NO CONTRAST"}, "T1w"),
    "named-ohne": ({"SeriesDescription": "t1 mprage ohne KM", "ProtocolName": "Kopf"}, "T1w"),
    "named-plus": ({"SeriesDescription": "SAG T1 C+", "ProtocolName": "BRAIN"}, "T1ce"),
    "named-nach": ({"SeriesDescription": "t1 nach Gadovist", "ProtocolName": "Kopf"}, "T1ce"),
    "named-volume": ({"ContrastBolusVolume": "7.5"}, "T1ce"),
    "named-doubt": ({"SeriesDescription": "t1 pre", "ContrastBolusAgent": "Dotarem"}, "unknown"),
}
MR = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
ROOT = "1.2.826.0.1.3680043.8.498."

ORIENTATIONS = {
    "axial": ([1, 0, 0], [0, 1, 0]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
    "coronal": ([1, 0, 0], [0, 0, -1]),
    "oblique": None,
}


def directions(name):
    if ORIENTATIONS[name]:
        return [np.array(v, float) for v in ORIENTATIONS[name]]
    row = np.array([0.96, 0.2, -0.1])
    row /= np.linalg.norm(row)
    column = np.cross([0.15, -0.25, 0.95], row)
    return row, column / np.linalg.norm(column)


def numbers(dtype, seed=1):
    info = np.iinfo(dtype)
    random = np.random.default_rng(seed)
    return random.integers(info.min, info.max, SHAPE, dtype=dtype, endpoint=True)


def uid(*parts):
    return ROOT + ".".join(str(part) for part in parts)


def common(case, series=1, **more):
    data = Dataset()
    data.SOPClassUID = MR
    data.StudyInstanceUID = uid(crc32(case.encode()))
    data.SeriesInstanceUID = uid(crc32(case.encode()), series)
    data.FrameOfReferenceUID = uid(7)
    data.PatientName, data.PatientID = "Doe^Jane", "12345"
    data.PatientBirthDate, data.StudyDate, data.StudyTime = "19700101", "20200101", "120000"
    data.Modality, data.Manufacturer = "MR", "SIEMENS"
    data.ManufacturerModelName, data.MagneticFieldStrength = "Prisma", 3
    data.SeriesNumber, data.SeriesDescription = series, "t1 mprage sag"
    data.ProtocolName, data.ImageType = "t1 mprage", ["ORIGINAL", "PRIMARY", "M", "ND"]
    data.ScanningSequence, data.SequenceVariant = ["GR", "IR"], ["SP", "MP"]
    data.MRAcquisitionType = "2D"
    data.EchoTime, data.RepetitionTime, data.InversionTime, data.FlipAngle = 3, 2000, 900, 9
    data.SliceThickness = SPACING[2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    for key, value in more.items():
        setattr(data, key, value)
    return data


def pixels(data, array):
    """array: [columns, rows] or [columns, rows, frames]."""
    dtype = array.dtype
    data.Columns, data.Rows = array.shape[:2]
    data.BitsAllocated = data.BitsStored = 8 * dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(dtype.kind == "i")
    stored = np.ascontiguousarray(array.T)
    data.PixelData = stored.astype(dtype.newbyteorder("<")).tobytes()
    if dtype.itemsize == 1 and len(data.PixelData) % 2:
        data.PixelData += b"\0"
    data["PixelData"].VR = "OW" if dtype.itemsize > 1 else "OB"


def save(data, path, syntax=ExplicitVRLittleEndian):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = data.SOPClassUID
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta = meta
    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax in (RLELossless, JPEG2000Lossless):
        data.compress(syntax)
    elif syntax == ExplicitVRBigEndian:
        meta.TransferSyntaxUID = syntax
        size = data.BitsAllocated // 8
        swapped = np.frombuffer(data.PixelData, f"<u{size}").astype(f">u{size}")
        data.PixelData = swapped.tobytes()
    else:
        meta.TransferSyntaxUID = syntax
    data.save_as(path, enforce_file_format=True)


def place(orientation, k):
    """Centre of the first pixel of slice k, LPS mm."""
    row, column = directions(orientation)
    return np.array([-31.0, 42.5, -13.25]) + np.cross(row, column) * SPACING[2] * k


def truth(orientation, volume):
    row, column = directions(orientation)
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = row * SPACING[0], column * SPACING[1]
    lps[:3, 2], lps[:3, 3] = np.cross(row, column) * SPACING[2], place(orientation, 0)
    return nib.Nifti1Image(volume.astype(np.float64), np.diag([-1, -1, 1, 1]) @ lps)


def geometry(data, orientation, k):
    row, column = directions(orientation)
    data.ImageOrientationPatient = [f"{v:.12f}"[:16] for v in (*row, *column)]
    data.ImagePositionPatient = [f"{v:.10f}"[:16] for v in place(orientation, k)]
    # Between rows first: PS3.3, 10.7.1.3.
    data.PixelSpacing = [SPACING[1], SPACING[0]]


class Maker:
    def __init__(self, folder):
        self.folder = folder
        (folder / "_truth").mkdir(parents=True)

    def expect(self, case, image, suffix=""):
        nib.save(image, self.folder / "_truth" / f"{case}{suffix}.nii.gz")

    def series(
        self, case, orientation="axial", volume=None, syntax=ExplicitVRLittleEndian, names=None,
        places=None, series=1, expected=True, to="", rescale=None, **more,
    ):
        volume = numbers(np.uint16) if volume is None else volume
        places = range(volume.shape[2]) if places is None else places
        files = []
        for number, k in enumerate(places):
            data = common(case, series, **more)
            data.SOPInstanceUID = uid(crc32(case.encode()), series, number + 1)
            data.InstanceNumber = number + 1
            geometry(data, orientation, k)
            pixels(data, volume[:, :, k])
            if rescale:
                data.RescaleSlope, data.RescaleIntercept = rescale
            name = names(number) if names else f"{series}-{number:03}.dcm"
            files.append(self.folder / case / to / name)
            save(data, files[-1], syntax)
        slope, intercept = rescale or (1, 0)
        if expected:
            scaled = volume.astype(np.float64) * slope + intercept
            self.expect(case, truth(orientation, scaled), f"-{series}" if series > 1 else "")
        return files

    def enhanced(self, case, syntax=ExplicitVRLittleEndian, orientation="oblique"):
        volume = numbers(np.uint16, 3)
        data = common(case)
        data.SOPClassUID, data.SOPInstanceUID = ENHANCED_MR, uid(crc32(case.encode()), 1, 1)
        for key in ["ScanningSequence", "SequenceVariant", "EchoTime", "RepetitionTime"]:
            delattr(data, key)
        data.EchoPulseSequence, data.InversionRecovery = "GRADIENT", "YES"
        data.PulseSequenceName, data.InstanceNumber = "tfl3d1", 1
        data.NumberOfFrames = SHAPE[2]
        shared = Dataset()
        geometry(frame := Dataset(), orientation, 0)
        one = lambda **values: Sequence([make_dataset(values)])
        shared.PlaneOrientationSequence = one(
            ImageOrientationPatient=frame.ImageOrientationPatient
        )
        shared.PixelMeasuresSequence = one(
            PixelSpacing=frame.PixelSpacing, SliceThickness=SPACING[2]
        )
        shared.MREchoSequence = one(EffectiveEchoTime=3.0)
        shared.MRTimingAndRelatedParametersSequence = one(RepetitionTime=2000.0, FlipAngle=9.0)
        data.SharedFunctionalGroupsSequence = Sequence([shared])
        order = np.random.default_rng(5).permutation(SHAPE[2])
        frames = []
        for number, k in enumerate(order):
            geometry(at := Dataset(), orientation, k)
            item = Dataset()
            item.PlanePositionSequence = one(ImagePositionPatient=at.ImagePositionPatient)
            item.FrameContentSequence = one(
                StackID="1", InStackPositionNumber=int(k) + 1, DimensionIndexValues=[1, int(k) + 1]
            )
            item.PixelValueTransformationSequence = one(
                RescaleIntercept=-7, RescaleSlope=0.5, RescaleType="US"
            )
            frames.append(item)
        data.PerFrameFunctionalGroupsSequence = Sequence(frames)
        pixels(data, volume[:, :, order])
        save(data, self.folder / case / "enhanced", syntax)
        self.expect(case, truth(orientation, volume * 0.5 - 7.0))


def legacy(maker):
    """Single slices put into one enhanced image by highdicom."""
    try:
        from highdicom.legacy import LegacyConvertedEnhancedMRImage
    except ImportError:
        print("left out: highdicom is missing")
        return
    files = maker.series("legacy", "sagittal")
    slices = [pydicom.dcmread(path) for path in files]
    for data in slices:
        data.PatientSex = data.StudyID = data.AccessionNumber = ""
        data.ReferringPhysicianName = data.PositionReferenceIndicator = ""
        data.StudyID, data.AcquisitionNumber = "1", 1
    merged = LegacyConvertedEnhancedMRImage(slices, uid(8), 1, uid(9), 1)
    for path in files:
        path.unlink()
    merged.SeriesDescription = "t1 mprage sag"
    merged.save_as(files[0].with_name("legacy"))


def make_dataset(values):
    data = Dataset()
    for key, value in values.items():
        setattr(data, key, value)
    return data


def rewrite(paths, change):
    for k, path in enumerate(paths):
        data = pydicom.dcmread(path)
        change(data, k)
        data.save_as(path)


def empty(path):
    """Other pixels, so that the image is no copy of one at its place."""
    data = pydicom.dcmread(path)
    data.PixelData = bytes(len(data.PixelData))
    data.save_as(path)


def careless(maker):
    """Series whose UIDs or positions an anonymiser, archive or exporter changed."""
    def each(name, base):
        return lambda data, k: setattr(data, name, uid(base, k + 1))

    files = maker.series("uids-same-instance", "oblique")
    rewrite(files, lambda data, _: setattr(data, "SOPInstanceUID", uid(66)))
    rewrite(maker.series("uids-each-series"), each("SeriesInstanceUID", 67))
    rewrite(maker.series("uids-each-space"), each("FrameOfReferenceUID", 68))

    files = maker.series("sent-again", "sagittal")
    again = [shutil.copy(path, path.with_name(f"again-{path.name}")) for path in files[::2]]
    rewrite(map(Path, again), each("SOPInstanceUID", 69))

    maker.series("people", "axial")
    other = maker.series("people", "axial", numbers(np.uint16, 8), series=2, PatientID="67890")
    rewrite(other, lambda data, _: setattr(data, "SeriesInstanceUID", uid(crc32(b"people"), 1)))
    rewrite(other, lambda data, k: setattr(data, "SOPInstanceUID", uid(crc32(b"people"), 1, k + 1)))

    # A slice of another direction, and one that lies beside the distances of the others.
    volume = np.random.default_rng(4).integers(0, 65535, (*SHAPE[:2], 20), np.uint16)
    files = maker.series("stray", "axial", volume)
    strays = [shutil.copy(files[k], files[k].with_name(f"stray-{k}.dcm")) for k in (5, 6)]

    def move(data, k):
        geometry(data, "coronal" if k == 0 else "axial", 40.4)
        data.SOPInstanceUID = uid(70, k)

    rewrite(map(Path, strays), move)

    # Heights in whole millimetres. The grid begins at that of the first slice.
    def round_height(data, _):
        at = data.ImagePositionPatient
        data.ImagePositionPatient = [at[0], at[1], round(float(at[2]))]

    rewrite(maker.series("rounded", "axial", expected=False), round_height)
    image = truth("axial", numbers(np.uint16))
    image.affine[2, 3] = round(image.affine[2, 3])
    maker.expect("rounded", nib.Nifti1Image(image.get_fdata(), image.affine))


def zipped(folder, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, f"../../{path.name}")


def parts(path):
    """Meta information and data set of a file."""
    content = path.read_bytes()
    end = 144 + struct.unpack("<I", content[140:144])[0]
    return content[132:end], content[end:]


def meta(syntax):
    """Meta information with this transfer syntax, or with none."""
    value = (syntax or "").encode()
    value += b"\0" * (len(value) % 2)
    named = struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value if syntax else b""
    sop = struct.pack("<HH2sH", 2, 2, b"UI", 26) + MR.encode() + b"\0"
    return struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(sop + named)) + sop + named


def deflate(content):
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


PREAMBLE = bytes(128) + b"DICM"


def odd_beginnings(maker):
    """Files with a part of what stands before a data set, or with the wrong thing."""
    explicit, implicit = ExplicitVRLittleEndian, ImplicitVRLittleEndian
    plain = lambda k: f"IM{k}"
    for case, syntax, names, change in [
        ("bare-dcm", explicit, None, lambda m, d: d),
        ("bare-explicit", explicit, plain, lambda m, d: d),
        ("bare-implicit", implicit, plain, lambda m, d: d),
        ("bare-big", ExplicitVRBigEndian, plain, lambda m, d: d),
        ("start-meta", explicit, plain, lambda m, d: m + d),
        ("start-mark", explicit, plain, lambda m, d: b"DICM" + m + d),
        ("start-alone", implicit, plain, lambda m, d: PREAMBLE + d),
        ("syntax-none", explicit, plain, lambda m, d: PREAMBLE + meta(None) + d),
        ("syntax-implicit", explicit, plain, lambda m, d: PREAMBLE + meta(implicit) + d),
        ("syntax-explicit", implicit, plain, lambda m, d: PREAMBLE + meta(explicit) + d),
        ("syntax-big", explicit, plain, lambda m, d: PREAMBLE + meta(ExplicitVRBigEndian) + d),
        ("deflated", explicit, None, lambda m, d: PREAMBLE + meta(DEFLATED) + deflate(d)),
    ]:
        for path in maker.series(case, "oblique", syntax=syntax, names=names):
            path.write_bytes(change(*parts(path)))

    for path in maker.series("_bare", "oblique", expected=False):
        path.write_bytes(parts(path)[1])
    zipped(maker.folder / "_bare", maker.folder / "zip-bare" / "series.zip")
    shutil.rmtree(maker.folder / "_bare")
    maker.expect("zip-bare", truth("oblique", numbers(np.uint16)))


DEFLATED = "1.2.840.10008.1.2.1.99"
SPACED, PLACED, TURNED = b"\x28\0\x30\0", b"\x20\0\x32\0", b"\x20\0\x37\0"


def store_as(path, tags, kind, change=lambda value: value):
    """Stores decimal texts as values of another kind."""
    content = path.read_bytes()
    for tag in tags:
        at = content.index(tag + b"DS")
        end = at + 8 + struct.unpack("<H", content[at + 6 : at + 8])[0]
        value = change(content[at + 8 : end])
        value += b" " * (len(value) % 2)
        is_long = kind in (b"UT", b"UN")
        length = struct.pack("<HI" if is_long else "<H", *([0] * is_long), len(value))
        content = content[: at + 4] + kind + length + value + content[end:]
    path.write_bytes(content)


def odd_numbers(maker):
    """Geometry that is no decimal text (DS), or not as the standard writes it."""
    binary = lambda v: struct.pack(f"<{len(v.split(bytes([92])))}d", *map(float, v.split(bytes([92]))))
    all_tags = [SPACED, PLACED, TURNED]
    for case, tags, kind, change in [
        ("numbers-ut", [SPACED], b"UT", lambda v: v),
        ("numbers-un", all_tags, b"UN", lambda v: v),
        ("numbers-lt", all_tags, b"LT", lambda v: v),
        ("numbers-fd", [SPACED], b"FD", binary),
        ("numbers-comma", [SPACED], b"DS", lambda v: v.replace(b".", b",")),
        ("refused-unit", [SPACED], b"DS", lambda v: v.strip() + b" mm"),
    ]:
        for path in maker.series(case, "oblique", expected=case.startswith("numbers")):
            store_as(path, tags, kind, change)


def unreadable(maker):
    """Files of which some or all are damaged: one refusal each."""
    for k, path in enumerate(maker.series("refused-cut", expected=False)):
        path.write_bytes(path.read_bytes()[: 500 + 3 * k])
    files = maker.series("_cut", expected=False)
    for path in files[8:]:
        path.write_bytes(path.read_bytes()[:600])
    zipped(maker.folder / "_cut", maker.folder / "refused-zipcut" / "x.zip")
    shutil.rmtree(maker.folder / "_cut")
    target = maker.folder / "skipped-nifti" / "x.zip"
    target.parent.mkdir()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("sub-1_T1w.nii.gz", bytes(50))
        archive.writestr("more.zip", b"PK\x03\x04" + bytes(50))


def make(folder):
    maker = Maker(folder)
    odd_beginnings(maker)
    odd_numbers(maker)
    unreadable(maker)
    for orientation in ORIENTATIONS:
        maker.series(orientation, orientation)
    maker.series("shuffled", "oblique", names=lambda k: f"IM{(k * 7) % 11}")
    maker.series("descending", "coronal", places=range(SHAPE[2] - 1, -1, -1))
    maker.series("signed", volume=numbers(np.int16))
    maker.series("byte", volume=numbers(np.uint8))
    maker.series("rescale", volume=numbers(np.int16), rescale=(2.5, -10))
    maker.series("implicit", syntax=ImplicitVRLittleEndian)
    maker.series("bigendian", syntax=ExplicitVRBigEndian)
    maker.series("rle", syntax=RLELossless)
    maker.series("rle-byte", volume=numbers(np.uint8), syntax=RLELossless)
    maker.series("rle-signed", volume=numbers(np.int16), syntax=RLELossless)
    maker.series("j2k", syntax=JPEG2000Lossless)
    maker.series("j2k-signed", volume=numbers(np.int16), syntax=JPEG2000Lossless)
    maker.enhanced("enhanced")
    maker.enhanced("enhanced-rle", RLELossless)
    legacy(maker)
    careless(maker)
    maker.series("copies")
    shutil.copy(folder / "copies/1-003.dcm", folder / "copies/copy.dcm")
    maker.series("pair", "sagittal", series=1)
    maker.series("pair", "coronal", series=2, volume=numbers(np.uint16, 9))
    maker.series("_zip", "oblique", expected=False)
    zipped(folder / "_zip", folder / "zip" / "series.zip")
    shutil.rmtree(folder / "_zip")
    maker.expect("zip", truth("oblique", numbers(np.uint16)))
    if shutil.which("dcmcjpeg"):
        for case, kind in [("jpegll", "+e1"), ("jpegll-any", "+el")]:
            twelve = numbers(np.uint16) >> 4
            files = maker.series(case, volume=twelve, BitsStored=12)
            for path in files:
                data = pydicom.dcmread(path)
                data.BitsStored, data.HighBit = 12, 11
                data.save_as(path)
                subprocess.run(["dcmcjpeg", kind, path, path], check=True)
        files = maker.series("jpeg", volume=numbers(np.uint8))
        for path in files:
            subprocess.run(["dcmcjpeg", "+eb", path, path], check=True)
        lossy = np.stack([pydicom.dcmread(path).pixel_array.T for path in files], axis=2)
        maker.expect("jpeg", truth("axial", lossy))
    else:
        print("left out: dcmcjpeg is missing, install Debian's package dcmtk")

    # What is no volume; the name says what becomes of it.
    doubled = maker.series("refused-doubled", places=[0, 1, 2, 2, 3, 4, 5], expected=False)
    empty(doubled[3])
    maker.series("refused-missing", places=[0, 1, 2, 4, 5, 6], expected=False)
    mosaic = maker.series("refused-mosaic", expected=False)
    for path in mosaic:
        data = pydicom.dcmread(path)
        data.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
        data.save_as(path)
    foreign = maker.series("refused-jpegls", expected=False)
    for path in foreign:
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.80"
        data.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" + bytes(60)])
        data["PixelData"].is_undefined_length = True
        data.save_as(path)
    short = maker.series("refused-short", expected=False)
    for path in short[4:5]:
        path.write_bytes(path.read_bytes()[:-300])
    (folder / "refused-garbage").mkdir()
    (folder / "refused-garbage/x.dcm").write_bytes(np.random.default_rng(3).bytes(5000))
    (folder / "refused-empty").mkdir()
    (folder / "refused-empty/x.dcm").write_bytes(b"")
    (folder / "refused-header").mkdir()
    (folder / "refused-header/x.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 400)
    (folder / "refused-zip").mkdir()
    (folder / "refused-zip/x.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    bomb = folder / "refused-bomb"
    bomb.mkdir()
    with zipfile.ZipFile(bomb / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.dcm", bytes(128) + b"DICM" + bytes(200 << 20))
    (folder / "skipped-zip").mkdir()
    with zipfile.ZipFile(folder / "skipped-zip/x.zip", "w") as archive:
        archive.writestr("letter.txt", "to a friend" * 50)
    for case, (header, _) in NAMED.items():
        maker.series(case, **header)
    maker.series("skipped-localiser", places=[0, 1], expected=False)
    for series, orientation in enumerate(["axial", "sagittal", "coronal"], 1):
        for path in maker.series("_planes", orientation, series=series, expected=False):
            data = pydicom.dcmread(path)
            data.SeriesInstanceUID, data.SeriesNumber = uid(77), 1
            data.save_as(path)
    (folder / "_planes").rename(folder / "skipped3-planes")
    maker.series("skipped-localiser-named", expected=False, SeriesDescription="AAHead_Scout")
    for path in maker.series("skipped-times", places=[0, 1, 2, 3, 0, 1, 2, 3], expected=False)[4:]:
        empty(path)
    maker.series("skipped-ct", expected=False, Modality="CT")
    maker.series("skipped-phase", expected=False, ImageType=["ORIGINAL", "PRIMARY", "P", "ND"])
    maker.series("skipped-derived", expected=False, ImageType=["DERIVED", "SECONDARY", "MPR"])


def difference(first, second, tolerance=0):
    """Whether two volumes have the same value at the same place, and else what differs."""
    to_second = np.linalg.inv(second.affine) @ first.affine
    whole = np.rint(to_second)
    off = np.abs(to_second[:3, :3] - whole[:3, :3]) @ np.array(first.shape)
    off = np.concatenate([off, np.abs(to_second[:3, 3] - whole[:3, 3])]).max()
    # Headers have floats of 24 bits and texts of 16 digits.
    if off > 5e-3:
        return f"places differ by {off} voxels"
    index = np.indices(first.shape).reshape(3, -1)
    at = (whole[:3, :3] @ index + whole[:3, 3:]).astype(int)
    if sorted(first.shape) != sorted(second.shape) or (at < 0).any():
        return f"extents {first.shape} and {second.shape}"
    one = np.asanyarray(first.dataobj, np.float64).ravel()
    other = np.asanyarray(second.dataobj, np.float64)[tuple(at)]
    # Volumes are written with 24 bits.
    worst = np.abs(np.float32(one) - np.float32(other)).max()
    return None if worst <= tolerance else f"values differ by up to {worst}"


def only(folder):
    found = sorted(folder.glob("*.nii.gz"))
    assert found, f"no volume in {folder}"
    return found


def check(folder, out):
    n_peer = 0
    cases = sorted(path.name for path in folder.iterdir() if not path.name.startswith("_"))
    for case in cases:
        if case.startswith(("refused", "skipped")):
            continue
        wanted = sorted((folder / "_truth").glob(f"{case}.nii.gz"))
        wanted += sorted((folder / "_truth").glob(f"{case}-[0-9].nii.gz"))
        found = only(out / case)
        assert len(found) == len(wanted), (case, found)
        for path, expected in zip(found, wanted):
            fault = difference(nib.load(path), nib.load(expected), TOLERANCE.get(case, 0))
            assert fault is None, f"{case}: {fault}"
            facts = json.loads(Path(str(path).replace(".nii.gz", ".json")).read_text())
            assert facts["EchoTime"] == 0.003 and facts["RepetitionTime"] == 2, facts
            assert "Doe" not in str(facts) and "12345" not in str(facts) and "1970" not in str(facts)
            suffix = NAMED.get(case, (None, "T1w"))[1]
            assert path.name.endswith(f"_{suffix}.nii.gz"), path
        if shutil.which("dcm2niix") and case not in NOT_FOR_DCM2NIIX:
            with tempfile.TemporaryDirectory() as other:
                call = ["dcm2niix", "-z", "y", "-b", "n", "-f", "%s", "-o", other, folder / case]
                subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
                peers = only(Path(other))
                assert len(peers) == len(found), (case, peers)
                for path, peer in zip(found, peers):
                    fault = difference(nib.load(path), nib.load(peer))
                    if case in NOT_LIKE_DCM2NIIX:
                        print(f"{case}: unlike dcm2niix ({fault}): {NOT_LIKE_DCM2NIIX[case]}")
                        continue
                    assert fault is None, f"{case}: unlike dcm2niix: {fault}"
                    n_peer += 1
    if shutil.which("dcm2niix"):
        print(f"{n_peer} volumes equal to those of dcm2niix")
    else:
        print("left out: dcm2niix is missing, install Debian's package dcm2niix")


# What dcm2niix does not read: zips, compressed images in several fragments, deflated and bare
# big-endian data sets, meta information without a preamble, and two wrong transfer syntaxes. What
# it makes another number of volumes of: slices with a SeriesInstanceUID each, and stray slices. What
# it refuses: rounded positions.
NOT_FOR_DCM2NIIX = [
    "zip", "zip-bare", "enhanced-rle", "deflated", "bare-big", "start-meta", "start-mark",
    "syntax-implicit", "syntax-big", "uids-each-series", "stray", "rounded",
]
# Where it reads otherwise, and why.
NOT_LIKE_DCM2NIIX = {
    "jpeg": "its decoder strays from libjpeg's by up to 7 of 255",
    "numbers-comma": "it takes 1,1 for 1",
    "numbers-fd": "it does not read a binary PixelSpacing",
}
# How far two decoders of a lossy compression may differ: one step of rounding.
TOLERANCE = {"jpeg": 1}


def brain(folder, seed, patient):
    """An ellipsoid of smooth signal on 40 slices of 48 x 52 pixels of 4 mm, background 0."""
    global SHAPE, SPACING
    SHAPE, SPACING = (48, 52, 40), (4.0, 4.0, 4.0)
    x, y, z = np.indices(SHAPE) - (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    inside = (x / 17) ** 2 + (y / 20) ** 2 + (z / 15) ** 2 < 1
    random = np.random.default_rng(seed)
    wave = np.sin(x / 3 + random.normal()) + np.cos(y / 4 + z / 5 + random.normal())
    signal = 100 + 20 * wave + random.normal(0, 2, SHAPE)
    volume = np.where(inside, np.clip(signal, 1, 250), 0).astype(np.uint16)
    Maker.expect = lambda *_: None
    maker = Maker.__new__(Maker)
    maker.folder = folder.parent
    maker.series(folder.name, volume=volume, series=seed, PatientID=patient)


def from_scan(scan, folder):
    image = nib.load(scan)
    volume = np.rint(np.asanyarray(image.dataobj)).clip(0, 65535).astype(np.uint16)
    nib.save(nib.Nifti1Image(volume, image.affine), f"{folder}.nii.gz")
    lps = np.diag([-1, -1, 1, 1]) @ image.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    for series, (a, b, c) in enumerate([(0, 1, 2), (1, 2, 0), (2, 0, 1)], 1):
        for k in range(volume.shape[c]):
            data = common(str(scan.name), series, SeriesDescription=f"along axis {c}")
            data.SOPInstanceUID = uid(crc32(scan.name.encode()), series, k + 1)
            data.InstanceNumber = k + 1
            ways = [*(lps[:3, a] / spacing[a]), *(lps[:3, b] / spacing[b])]
            data.ImageOrientationPatient = [f"{v:.12f}"[:16] for v in ways]
            origin = lps[:3, 3] + lps[:3, c] * k
            data.ImagePositionPatient = [f"{v:.10f}"[:16] for v in origin]
            data.PixelSpacing = [float(spacing[b]), float(spacing[a])]
            data.SliceThickness = float(spacing[c])
            pixels(data, volume.transpose(a, b, c)[:, :, k])
            save(data, folder / f"{series}-{(k * 37) % 997:03}")


def main():
    command, *paths = sys.argv[1:]
    if command == "make":
        make(Path(paths[0]))
    elif command == "check":
        check(Path(paths[0]), Path(paths[1]))
    elif command == "from":
        from_scan(Path(paths[0]), Path(paths[1]))
    elif command in ("turn", "rename"):
        data = pydicom.dcmread(paths[0])
        data.SOPInstanceUID += ".1"
        if command == "turn":
            data.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        data.save_as(paths[1])
    elif command == "brain":
        brain(Path(paths[0]), int(paths[1]), paths[2])
    else:
        fault = difference(nib.load(paths[0]), nib.load(paths[1]))
        assert fault is None, fault
        print("equal")


main()
