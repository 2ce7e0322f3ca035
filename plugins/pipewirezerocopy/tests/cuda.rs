// SPDX-License-Identifier: MIT OR Apache-2.0

//! The import into CUDA memory, against a libcuda whose GPU memory is the process's own
//! (tests/cuda-fake) and the real libgstcuda. It does what was queued only when somebody waits.

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use gst::prelude::*;
use gst_video::prelude::*;
use gstpipewirezerocopy::cuda::{Context, Display, Error, Importer, Pool, Source, Stream, Way};
use gstpipewirezerocopy::egl::{self, DmaBuf, Plane};
use zerocopy_cuda_fake::{Alive, Fake};

/// The library, for one test at a time: what it counts is the whole process's. None where this
/// GStreamer has no CUDA memory.
fn fake() -> Option<MutexGuard<'static, Fake>> {
    static FAKE: OnceLock<Mutex<Fake>> = OnceLock::new();
    gst::init().unwrap();
    let (major, minor, ..) = gst::version();
    if (major, minor) < (1, 24) {
        println!("not run: GStreamer {major}.{minor} has no libgstcuda that would do");
        return None;
    }
    let fake = FAKE.get_or_init(|| {
        let fake = Fake::load();
        gstpipewirezerocopy::cuda::available().unwrap();
        Mutex::new(fake)
    });
    let fake = fake.lock().unwrap_or_else(PoisonError::into_inner);
    fake.calls();
    Some(fake)
}

/// Makes images of numbers: the first plane is the number that the fake knows it by, the next one
/// is the number after it.
struct Numbers;

struct Number(usize);

// SAFETY: the fake takes any number, and nothing draws.
unsafe impl Display for Numbers {
    type Image = Number;

    fn import(&self, buffer: &DmaBuf<'_>) -> Result<Number, egl::Error> {
        Ok(Number(buffer.planes[0].offset as usize))
    }

    fn raw(image: &Number) -> *mut c_void {
        std::ptr::without_provenance_mut(image.0)
    }

    fn egl(&self) -> Result<&egl::Display, egl::Error> {
        Err(egl::Error::Unavailable("nothing draws here".into()))
    }
}

const XR24: u32 = u32::from_le_bytes(*b"XR24");
const NV12: u32 = u32::from_le_bytes(*b"NV12");

/// Bytes that differ from place to place, for as long as the process lives.
fn pattern(bytes: usize, seed: usize) -> &'static mut [u8] {
    let byte = |index: usize| (index * 31 + index / 251 + seed) as u8;
    (0..bytes).map(byte).collect::<Vec<_>>().leak()
}

struct Setup {
    importer: Importer<Numbers>,
    pool: Pool,
    info: gst_video::VideoInfo,
    // Last: all else is of it.
    _stream: Stream,
}

fn setup(format: gst_video::VideoFormat, width: u32, height: u32) -> Setup {
    let context = Context::new(0).unwrap();
    let stream = Stream::new(&context).unwrap();
    let info = gst_video::VideoInfo::builder(format, width, height)
        .build()
        .unwrap();
    let pool = Pool::new(&context, &stream, &caps(&info), info.size() as u32).unwrap();
    pool.pool.set_active(true).unwrap();
    Setup {
        importer: Importer::new(Numbers, &context, Way::Image).unwrap(),
        pool,
        info,
        _stream: stream,
    }
}

fn caps(info: &gst_video::VideoInfo) -> gst::Caps {
    let mut caps = info.to_caps().unwrap();
    let features = gst::CapsFeatures::new(["memory:CUDAMemory"]);
    caps.get_mut().unwrap().set_features(0, Some(features));
    caps
}

impl Setup {
    /// Imports the picture whose planes are the images from `image` on.
    fn prepare(
        &mut self,
        fourcc: u32,
        image: usize,
        size: (u32, u32),
    ) -> Result<Source<Number>, Error> {
        let file = File::open("/dev/null").unwrap();
        let plane = |number: usize| Plane {
            fd: file.as_fd(),
            offset: number as u32,
            stride: 0,
        };
        let planes = [plane(image), plane(image + 1)];
        self.importer.prepare(&DmaBuf {
            fourcc,
            modifier: Some(0),
            width: size.0,
            height: size.1,
            planes: &planes[..if fourcc == NV12 { 2 } else { 1 }],
        })
    }

    /// Copies a part of it.
    fn copy_part(&mut self, source: &Source<Number>, at: (u32, u32)) -> Result<gst::Buffer, Error> {
        let mut buffer = self.pool.pool.acquire_buffer(None).unwrap();
        let writable = buffer.get_mut().unwrap();
        self.importer
            .copy(source, at, writable, &self.info)
            .map(|()| buffer)
    }

    /// Imports a picture as large as the buffers and copies it.
    fn copy(&mut self, fourcc: u32, image: usize) -> Result<gst::Buffer, Error> {
        let source = self.prepare(fourcc, image, (self.info.width(), self.info.height()))?;
        self.copy_part(&source, (0, 0))
    }

    /// Row `y` of a plane, as the CPU reads it back.
    fn row(&self, buffer: &gst::Buffer, plane: usize, y: usize, bytes: usize) -> Vec<u8> {
        let frame = gst_video::VideoFrameRef::from_buffer_ref_readable(buffer, &self.info).unwrap();
        let start = frame.plane_stride()[plane] as usize * y;
        frame.plane_data(plane as u32).unwrap()[start..][..bytes].to_vec()
    }
}

fn nothing_left(fake: &Fake) {
    assert_eq!(fake.alive(), Alive::default());
}

#[test]
fn a_picture_is_copied_row_by_row_whatever_the_gpus_pitch() {
    let Some(fake) = fake() else { return };
    // 5464 bytes in a row; the fake's memory has 5632, the producer's 5504.
    let (width, height, pitch) = (1366, 768, 5504);
    let source = pattern(pitch * height, 0);
    fake.set_image(1000, source, pitch, 4);
    let mut setup = setup(gst_video::VideoFormat::Bgrx, 1366, 768);
    assert!(setup.pool.size as usize > setup.info.size());
    let buffer = setup.copy(XR24, 1000).unwrap();
    for y in [0, 1, 400, 767] {
        assert!(setup.row(&buffer, 0, y, width * 4) == source[y * pitch..][..width * 4]);
    }
    drop((buffer, setup));
    nothing_left(&fake);
}

#[test]
fn nv12_is_copied_plane_by_plane() {
    let Some(fake) = fake() else { return };
    let (luma, chroma) = (pattern(192 * 50, 3), pattern(192 * 25, 5));
    fake.set_image(1010, luma, 192, 1);
    fake.set_image(1011, chroma, 192, 2);
    let mut setup = setup(gst_video::VideoFormat::Nv12, 178, 50);
    let buffer = setup.copy(NV12, 1010).unwrap();
    for y in [0, 24, 49] {
        assert_eq!(setup.row(&buffer, 0, y, 178), luma[y * 192..][..178]);
    }
    for y in [0, 24] {
        assert_eq!(setup.row(&buffer, 1, y, 178), chroma[y * 192..][..178]);
    }
}

#[test]
fn a_part_of_a_picture_is_copied_from_where_it_lies() {
    let Some(fake) = fake() else { return };
    let source = pattern(256 * 64, 7);
    fake.set_image(1020, source, 256, 4);
    let mut setup = setup(gst_video::VideoFormat::Bgrx, 20, 10);
    let source_of_all = setup.prepare(XR24, 1020, (64, 64)).unwrap();
    let buffer = setup.copy_part(&source_of_all, (44, 54)).unwrap();
    for y in [0, 9] {
        let expected = &source[(54 + y) * 256 + 44 * 4..][..80];
        assert_eq!(setup.row(&buffer, 0, y, 80), expected);
    }
    let outside = setup.copy_part(&source_of_all, (45, 54)).unwrap_err();
    assert!(matches!(outside, Error::Refused(_)), "{outside}");
}

#[test]
fn a_buffer_is_registered_once_and_as_long_as_it_is_there() {
    let Some(fake) = fake() else { return };
    fake.set_image(1030, pattern(64 * 16, 0), 64, 4);
    fake.set_image(1031, pattern(64 * 16, 1), 64, 4);
    let mut setup = setup(gst_video::VideoFormat::Bgrx, 16, 16);
    let sources = [1030, 1031].map(|image| setup.prepare(XR24, image, (16, 16)).unwrap());
    for _ in 0..3 {
        for source in &sources {
            setup.copy_part(source, (0, 0)).unwrap();
        }
    }
    assert_eq!(fake.alive().resources, 2);
    let calls = fake.calls();
    let count = |name: &str| calls.iter().filter(|call| *call == name).count();
    assert_eq!(count("cuGraphicsEGLRegisterImage"), 2);
    assert_eq!(count("cuMemcpy2DAsync_v2"), 6);
    drop(sources);
    assert_eq!(fake.alive().resources, 0);
    drop(setup);
    nothing_left(&fake);
}

#[test]
fn a_buffer_outlives_the_context_that_it_was_imported_in_and_serves_no_other() {
    let Some(fake) = fake() else { return };
    fake.set_image(1035, pattern(64 * 16, 0), 64, 4);
    let mut first = setup(gst_video::VideoFormat::Bgrx, 16, 16);
    let source = first.prepare(XR24, 1035, (16, 16)).unwrap();
    drop(first);
    let mut second = setup(gst_video::VideoFormat::Bgrx, 16, 16);
    assert!(!source.is_of(second.importer.context()));
    let error = second.copy_part(&source, (0, 0)).unwrap_err();
    assert!(error.to_string().contains("another context"), "{error}");
    drop((second, source));
    nothing_left(&fake);
}

#[test]
fn the_copy_is_done_before_the_producer_draws_again() {
    let Some(fake) = fake() else { return };
    let source = pattern(64 * 16, 9);
    let before = source.to_vec();
    // SAFETY: the fake only reads it, in calls from this thread.
    let shared = unsafe { std::slice::from_raw_parts(source.as_ptr(), source.len()) };
    fake.set_image(1040, shared, 64, 4);
    let mut setup = setup(gst_video::VideoFormat::Bgrx, 16, 16);
    fake.calls();
    let buffer = setup.copy(XR24, 1040).unwrap();
    source.fill(0);
    assert_eq!(setup.row(&buffer, 0, 15, 64), before[15 * 64..]);
    let calls = fake.calls();
    let position = |name: &str| calls.iter().position(|call| call == name).unwrap();
    assert!(position("cuMemcpy2DAsync_v2") < position("cuEventRecord"));
    assert!(position("cuEventRecord") < position("cuEventSynchronize"));
}

#[test]
fn what_the_driver_answers_is_told_apart() {
    let Some(fake) = fake() else { return };
    fake.set_image(1050, pattern(64 * 16, 0), 64, 4);
    let mut setup = setup(gst_video::VideoFormat::Bgrx, 16, 16);
    for (call, code, text) in [
        ("cuGraphicsEGLRegisterImage", 2, "CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuGraphicsResourceGetMappedEglFrame", 2, "OUT_OF_MEMORY"),
        ("cuMemcpy2DAsync_v2", 719, "CUDA_ERROR_LAUNCH_FAILED"),
        ("cuEventSynchronize", 719, "CUDA_ERROR_LAUNCH_FAILED"),
        ("cuEventRecord", 4242, "CUDA error 4242"),
    ] {
        fake.fail(call, 0, code);
        let error = setup.copy(XR24, 1050).unwrap_err();
        fake.fail(call, 0, 0);
        let as_expected = match code {
            2 => matches!(error, Error::Exhausted(_)),
            719 => matches!(error, Error::Lost(_)),
            _ => matches!(error, Error::Refused(_)),
        };
        assert!(as_expected, "{call}: {error:?}");
        assert!(error.to_string().contains(text), "{call}: {error}");
    }
    setup.copy(XR24, 1050).unwrap();
    drop(setup);
    nothing_left(&fake);
}

#[test]
fn an_image_that_the_driver_refuses_is_drawn_or_refused_with_both_reasons() {
    let Some(fake) = fake() else { return };
    let mut setup = setup(gst_video::VideoFormat::Bgrx, 16, 16);
    let error = setup.copy(XR24, 4711).unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("cuGraphicsEGLRegisterImage"), "{text}");
    assert!(text.contains("nothing draws here"), "{text}");
    drop(setup);
    nothing_left(&fake);
}

#[test]
fn an_image_that_is_not_what_was_imported_is_refused() {
    let Some(fake) = fake() else { return };
    // Two bytes in a pixel instead of four; fewer rows.
    fake.set_image(1060, pattern(64 * 16, 0), 64, 2);
    fake.set_image(1061, pattern(64 * 15, 0), 64, 4);
    let mut setup = setup(gst_video::VideoFormat::Bgrx, 16, 16);
    for image in [1060, 1061] {
        let error = setup.copy(XR24, image).unwrap_err();
        assert!(
            error.to_string().contains("not what was imported"),
            "{error}"
        );
    }
}

#[test]
fn five_hundred_starts_leave_nothing_behind() {
    let Some(fake) = fake() else { return };
    fake.set_image(1070, pattern(64 * 16, 0), 64, 4);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut first = None;
    for _ in 0..500 {
        let mut setup = setup(gst_video::VideoFormat::Bgrx, 16, 16);
        let buffer = setup.copy(XR24, 1070).unwrap();
        drop(setup);
        // Downstream may have it for longer; the context waits for it.
        assert_eq!(fake.alive().contexts, 1);
        drop(buffer);
        nothing_left(&fake);
        let first = *first.get_or_insert_with(descriptors);
        assert_eq!(descriptors(), first);
    }
}

#[test]
fn only_a_pool_of_the_same_context_is_downstreams_to_give() {
    let Some(fake) = fake() else { return };
    let info = gst_video::VideoInfo::builder(gst_video::VideoFormat::Bgrx, 16, 16)
        .build()
        .unwrap();
    let caps = caps(&info);
    let (ours, theirs) = (Context::new(0).unwrap(), Context::new(0).unwrap());
    let stream = Stream::new(&ours).unwrap();
    let made_by = |context: &Context| {
        let stream = Stream::new(context).unwrap();
        Pool::new(context, &stream, &caps, 1024).unwrap().pool
    };
    let proposed = |pool| Pool::of_downstream(pool, &ours, &stream, &caps, (1024, 0, 0));
    let taken = proposed(made_by(&ours)).expect("it is of our context");
    assert!(taken.size > 1024, "the size is that of the memory");
    assert!(proposed(made_by(&theirs)).is_none());
    assert!(proposed(gst_video::VideoBufferPool::new().upcast()).is_none());
    drop((taken, stream, ours, theirs));
    nothing_left(&fake);
}

#[test]
fn a_context_is_shared_as_gstreamer_shares_it() {
    let Some(fake) = fake() else { return };
    let context = Context::new(1).unwrap();
    assert_eq!(context.device(), 1);
    let shared = context.to_shared().unwrap();
    assert_eq!(shared.context_type(), "gst.cuda.context");
    assert_eq!(Context::from_shared(&shared), Some(context.clone()));
    let other = gst::Context::new("gst.gl.GLDisplay", true);
    assert_eq!(Context::from_shared(&other), None);
    let error = Context::new(2).unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error}");
    drop((shared, context));
    nothing_left(&fake);
}
