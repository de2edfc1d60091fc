"""Small scans in every format, made by code: a body in air, and DICOM series of it with chosen faults."""

import gzip

import nibabel as nib
import numpy as np

STEP = 3.0  # mm between DICOM slices
PIXEL = (0.8, 1.1)  # mm, rows and columns apart
SHAPE = (20, 44, 40)


def ct(seed=0, shape=SHAPE):
    """int16 HU (d, h, w): air, fat, muscle, noise."""
    rng = np.random.default_rng(seed)
    volume = np.full(shape, -1000.0)
    inner = tuple(slice(n // 8, -(n // 8)) for n in shape)
    volume[inner] = -100
    volume[tuple(slice(n // 4, -(n // 4)) for n in shape)] = 50
    return np.rint(volume + 20 * rng.standard_normal(shape)).astype(np.int16)


def nifti(voxels, affine=None, compress=False, **header):
    """Bytes of a .nii whose array is (w, h, d, ...), with raw header fields overwritten."""
    image = nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    data = bytearray(image.to_bytes())
    for name, value in header.items():
        np.frombuffer(data, nib.Nifti1Header.template_dtype, 1)[name][0] = value
    return gzip.compress(bytes(data), 1) if compress else bytes(data)


def dicom_slice(file, plane, position, *, series="1.2.3", modality="CT", slope=1, inter=-1024, tilt=0.0, **tags):
    """One CT slice as DICOM; ``plane``: HU. tags set to None are left out."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(file)])
    made = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    made.SeriesInstanceUID, made.Modality, made.PatientID = series, modality, "nobody"
    made.Rows, made.Columns = plane.shape
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
    made.RescaleSlope, made.RescaleIntercept = slope, inter
    made.ImageOrientationPatient = [1, 0, 0, 0, float(np.cos(tilt)), float(-np.sin(tilt))]
    made.ImagePositionPatient = [float(x) for x in position]
    made.PixelSpacing = list(PIXEL)
    made.PixelData = np.rint((plane.astype(float) - inter) / slope).astype("<i2").tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    made.save_as(file)


def dicom_series(folder, volume, *, skip=(), **options):
    """A series of ``volume`` (d, h, w), first slice at the feet, under names whose order says nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for z, (plane, name) in enumerate(zip(volume, _names(len(volume)), strict=True)):
        if z not in skip:
            dicom_slice(folder / name, plane, [-20, -30, 5 + STEP * z], **options)
    return folder


def place_of(name, count=SHAPE[0]):
    """Which slice of a series lies in the file of this name."""
    return _names(count).index(name)


def _names(count):
    return [f"{number:03d}.dcm" for number in np.random.default_rng(1).permutation(count)]
