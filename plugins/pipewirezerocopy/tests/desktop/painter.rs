// SPDX-License-Identifier: MIT OR Apache-2.0

//! A producer that says what it is told to say about its pictures, be it true or not.
//!
//! It is a PipeWire stream with memory of its own, on a thread of its own. What a test hands it is
//! streamed as soon as somebody takes it, and in that order.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gstpipewirezerocopy::capture::negotiate::{Color, PodBytes};
use gstpipewirezerocopy::capture::{PixelFormat, StreamFormat};
use libspa::param::ParamType;
use libspa::pod::serialize::PodSerializer;
use libspa::pod::{Object, Pod, Property, Value};
use libspa::sys as spa_sys;
use libspa::utils::{Direction, Id, SpaTypes};
use pipewire::channel::{Receiver, Sender};
use pipewire::context::ContextRc;
use pipewire::main_loop::MainLoopRc;
use pipewire::properties::properties;
use pipewire::stream::{Stream, StreamFlags, StreamRc, StreamState};
use pipewire::sys::pw_buffer;
use zerocopy_test_support::desktop::Desktop;

/// How often a picture is shown, if there is one: a driver's cycle.
const CYCLE: Duration = Duration::from_millis(4);

/// Bytes of memory that each buffer really has, if nothing else is said.
pub const MEMORY: u32 = 64 * 1024;

/// Bytes of metadata for a pointer, enough for 8x8 pixels.
const CURSOR_BYTES: usize =
    size_of::<spa_sys::spa_meta_cursor>() + size_of::<spa_sys::spa_meta_bitmap>() + 8 * 8 * 4;

/// What is in a buffer, and what is said about it.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    /// Goes to the beginning of the memory.
    pub bytes: Vec<u8>,
    pub offset: u32,
    pub size: u32,
    pub stride: i32,
    /// SPA_CHUNK_FLAG_*
    pub chunk_flags: i32,
    /// SPA_META_HEADER_FLAG_*
    pub header_flags: u32,
    /// When it was captured, in nanoseconds of CLOCK_MONOTONIC.
    pub captured: Option<i64>,
    /// x, y, width, height
    pub crop: Option<(i32, i32, u32, u32)>,
    /// Likewise; the list ends at an empty one.
    pub damage: Vec<(i32, i32, u32, u32)>,
    /// SPA_META_TRANSFORMATION_*
    pub transform: u32,
    pub cursor: Option<Cursor>,
}

/// A pointer that lies beside the picture.
#[derive(Clone, Debug)]
pub struct Cursor {
    pub position: (i32, i32),
    pub hotspot: (i32, i32),
    /// Width, height and pixels in BGRA; the last one again where there is none.
    pub bitmap: Option<(u32, u32, Vec<u8>)>,
}

impl Picture {
    /// A frame without padding.
    pub fn plain(bytes: Vec<u8>, stride: i32) -> Self {
        Self {
            size: bytes.len() as u32,
            bytes,
            stride,
            ..Self::default()
        }
    }
}

/// The memory of a painter's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Canvas {
    /// How large they are.
    pub bytes: u32,
    /// How large it says that they are.
    pub announced: u32,
    pub buffers: u32,
    /// Whether they cannot shrink, as those of compositors.
    pub sealed: bool,
    /// Whether it begins a cycle only with a buffer to show, as compositors do: PipeWire hands one back in
    /// each cycle, so one that has none left has none for ever.
    pub thrifty: bool,
    /// Whether it calls them DMA-BUFs with these modifiers. Real ones need a kernel that makes them.
    pub modifiers: &'static [u64],
}

impl Default for Canvas {
    fn default() -> Self {
        Self {
            bytes: MEMORY,
            announced: MEMORY,
            buffers: 8,
            sealed: true,
            thrifty: false,
            modifiers: &[],
        }
    }
}

impl Canvas {
    fn memory(self) -> u32 {
        if self.modifiers.is_empty() {
            spa_sys::SPA_DATA_MemFd
        } else {
            spa_sys::SPA_DATA_DmaBuf
        }
    }
}

enum Command {
    Show(Picture),
    /// Shows it now, and again whenever the stream begins, as compositors do.
    Keep(Picture),
    Change(PixelFormat, (u32, u32)),
    Shrink,
    Quit,
}

pub struct Painter {
    format: PixelFormat,
    commands: Sender<Command>,
    said: Arc<Said>,
    thread: Option<JoinHandle<()>>,
}

/// What is known of the stream.
#[derive(Default)]
struct Said {
    /// The node's id, once there is one.
    node: AtomicU32,
    /// How often a format was fixed.
    formats: AtomicU32,
    /// Buffers that there are, each with a file of this process.
    buffers: AtomicU32,
}

impl Painter {
    /// A node of that name with pictures of that format and size.
    pub fn start(desktop: &Desktop, name: &str, format: PixelFormat, size: (u32, u32)) -> Self {
        Self::on_canvas(desktop, name, format, size, Canvas::default())
    }

    /// The same with other memory.
    pub fn on_canvas(
        desktop: &Desktop,
        name: &str,
        format: PixelFormat,
        size: (u32, u32),
        canvas: Canvas,
    ) -> Self {
        let name = name.to_owned();
        let socket = desktop.pipewire();
        let (commands, receiver) = pipewire::channel::channel();
        let said = Arc::new(Said::default());
        let saying = said.clone();
        let thread = std::thread::spawn(move || {
            let offered = offer(format, size, canvas);
            run(socket.into(), &name, &offered, canvas, &saying, receiver);
        });
        Self {
            format,
            commands,
            said,
            thread: Some(thread),
        }
    }

    /// A node of that name that shows one still picture of videotestsrc; see
    /// [`test_picture`](super::run::test_picture).
    pub fn still(desktop: &Desktop, name: &str, caps: &str) -> Self {
        let sample = super::run::test_picture(caps);
        let info = gst_video::VideoInfo::from_caps(sample.caps().unwrap()).unwrap();
        let format = PixelFormat::from_name(info.name()).unwrap();
        let size = (info.width(), info.height());
        let painter = Self::start(desktop, name, format, size);
        // As GStreamer lays it out: rows with padding, planes behind each other.
        let bytes = sample.buffer().unwrap().map_readable().unwrap().to_vec();
        let still = Command::Keep(Picture::plain(bytes, info.stride()[0]));
        assert!(painter.commands.send(still).is_ok());
        painter
    }

    pub fn show(&self, picture: Picture) {
        assert!(self.commands.send(Command::Show(picture)).is_ok());
    }

    /// Cuts all memory that is not sealed off.
    pub fn shrink(&self) {
        assert!(self.commands.send(Command::Shrink).is_ok());
    }

    /// Changes the size of its pictures.
    pub fn change(&self, width: u32, height: u32) {
        self.change_format(self.format, (width, height));
    }

    /// Changes the format and size of its pictures.
    pub fn change_format(&self, format: PixelFormat, size: (u32, u32)) {
        assert!(self.commands.send(Command::Change(format, size)).is_ok());
    }

    /// Its node's id; waits for it.
    pub fn node(&self) -> u32 {
        until(|| self.said.node.load(Ordering::Relaxed) > 0);
        self.said.node.load(Ordering::Relaxed)
    }

    /// Files that this process has open for its buffers.
    pub fn files(&self) -> usize {
        self.said.buffers.load(Ordering::Relaxed) as usize
    }

    /// How often a format was fixed.
    pub fn formats(&self) -> u32 {
        self.said.formats.load(Ordering::Relaxed)
    }
}

impl Drop for Painter {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits until something holds of which nobody tells.
pub fn until(holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < super::run::LONG, "it never came to that");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What the callbacks share.
struct State {
    pictures: RefCell<VecDeque<Picture>>,
    still: RefCell<Option<Picture>>,
    memory: RefCell<HashMap<*mut pw_buffer, File>>,
    canvas: Canvas,
}

fn run(
    socket: std::os::fd::OwnedFd,
    name: &str,
    offered: &[PodBytes],
    canvas: Canvas,
    said: &Arc<Said>,
    receiver: Receiver<Command>,
) {
    pipewire::init();
    let main_loop = MainLoopRc::new(None).unwrap();
    let context = ContextRc::new(&main_loop, None).unwrap();
    let core = context.connect_fd_rc(socket, None).unwrap();
    let stream = StreamRc::new(
        core,
        name,
        properties! {
            *pipewire::keys::MEDIA_TYPE => "Video",
            *pipewire::keys::MEDIA_CLASS => "Video/Source",
            *pipewire::keys::NODE_NAME => name,
        },
    )
    .unwrap();
    let state = Rc::new(State {
        pictures: RefCell::default(),
        still: RefCell::default(),
        memory: RefCell::default(),
        canvas,
    });
    let shared = || state.clone();
    let _listener = stream
        .add_local_listener::<()>()
        .state_changed({
            let (state, said) = (shared(), said.clone());
            move |stream, (), _, new| {
                if new == StreamState::Paused {
                    said.node.store(stream.node_id(), Ordering::Relaxed);
                }
                let mut pictures = state.pictures.borrow_mut();
                if new == StreamState::Streaming && pictures.is_empty() {
                    pictures.extend(state.still.borrow().clone());
                }
            }
        })
        .param_changed({
            let (state, said) = (shared(), said.clone());
            move |stream, (), id, pod| {
                if id == ParamType::Format.as_raw() && pod.is_some() {
                    said.formats.fetch_add(1, Ordering::Relaxed);
                    state.answer(stream);
                }
            }
        })
        .add_buffer({
            let (state, said) = (shared(), said.clone());
            move |_, (), raw| {
                state.add_buffer(raw);
                said.buffers.fetch_add(1, Ordering::Relaxed);
            }
        })
        .remove_buffer({
            let (state, said) = (shared(), said.clone());
            move |_, (), raw| {
                state.memory.borrow_mut().remove(&raw);
                said.buffers.fetch_sub(1, Ordering::Relaxed);
            }
        })
        .process({
            let state = shared();
            move |stream, ()| {
                if !state.canvas.thrifty {
                    state.paint(stream);
                }
            }
        })
        .register()
        .unwrap();

    let mut params: Vec<&Pod> = offered.iter().map(PodBytes::pod).collect();
    stream
        .connect(
            Direction::Output,
            None,
            StreamFlags::DRIVER | StreamFlags::ALLOC_BUFFERS,
            &mut params,
        )
        .unwrap();

    let timer = main_loop.loop_().add_timer({
        let (state, stream) = (shared(), stream.clone());
        move |_| state.trigger(&stream)
    });
    let _ = timer.update_timer(Some(CYCLE), Some(CYCLE));

    let quit = main_loop.clone();
    let shrinking = shared();
    let _receiver = receiver.attach(main_loop.loop_(), move |command| match command {
        Command::Show(picture) => {
            state.pictures.borrow_mut().push_back(picture);
        }
        Command::Keep(picture) => {
            state.pictures.borrow_mut().push_back(picture.clone());
            state.still.replace(Some(picture));
        }
        Command::Change(format, size) => {
            let pods = offer(format, size, canvas);
            let mut params: Vec<&Pod> = pods.iter().map(PodBytes::pod).collect();
            stream.update_params(&mut params).unwrap();
        }
        Command::Shrink => {
            for memory in shrinking.memory.borrow().values() {
                // Fails where it is sealed.
                let _ = memory.set_len(0);
            }
        }
        Command::Quit => quit.quit(),
    });
    main_loop.run();
}

fn offer(format: PixelFormat, (width, height): (u32, u32), canvas: Canvas) -> Vec<PodBytes> {
    // Modifiers one by one: a list would be for the producer to choose from, and be asked for its choice.
    let fixed = |modifier| StreamFormat {
        format,
        width,
        height,
        framerate: (0, 1),
        max_framerate: None,
        color: Color::default(),
        modifier,
    };
    let mut formats: Vec<_> = canvas.modifiers.iter().map(|m| fixed(Some(*m))).collect();
    if formats.is_empty() {
        formats.push(fixed(None));
    }
    formats.iter().map(StreamFormat::pod).collect()
}

impl State {
    /// Begins a cycle if there is something to show and somebody to show it to.
    fn trigger(&self, stream: &Stream) {
        if !self.pictures.borrow().is_empty() && stream.state() == StreamState::Streaming {
            if self.canvas.thrifty && !self.paint(stream) {
                return;
            }
            // SAFETY: The stream is alive, and this is its loop's thread.
            unsafe { pipewire::sys::pw_stream_trigger_process(stream.as_raw_ptr()) };
        }
    }

    fn answer(&self, stream: &Stream) {
        let int = |key, value: u32| Property::new(key, Value::Int(value as i32));
        let buffers = pod(
            SpaTypes::ObjectParamBuffers,
            ParamType::Buffers,
            vec![
                int(spa_sys::SPA_PARAM_BUFFERS_buffers, self.canvas.buffers),
                int(spa_sys::SPA_PARAM_BUFFERS_blocks, 1),
                int(spa_sys::SPA_PARAM_BUFFERS_size, self.canvas.announced),
                int(
                    spa_sys::SPA_PARAM_BUFFERS_dataType,
                    1 << self.canvas.memory(),
                ),
            ],
        );
        let meta = |kind, size: usize| {
            pod(
                SpaTypes::ObjectParamMeta,
                ParamType::Meta,
                vec![
                    Property::new(spa_sys::SPA_PARAM_META_type, Value::Id(Id(kind))),
                    int(spa_sys::SPA_PARAM_META_size, size as u32),
                ],
            )
        };
        let pods = [
            buffers,
            meta(
                spa_sys::SPA_META_Header,
                size_of::<spa_sys::spa_meta_header>(),
            ),
            meta(
                spa_sys::SPA_META_VideoCrop,
                size_of::<spa_sys::spa_meta_region>(),
            ),
            meta(
                spa_sys::SPA_META_VideoDamage,
                4 * size_of::<spa_sys::spa_meta_region>(),
            ),
            meta(
                spa_sys::SPA_META_VideoTransform,
                size_of::<spa_sys::spa_meta_videotransform>(),
            ),
            meta(spa_sys::SPA_META_Cursor, CURSOR_BYTES),
        ];
        let mut params: Vec<&Pod> = pods
            .iter()
            .map(|bytes| Pod::from_bytes(bytes).unwrap())
            .collect();
        stream.update_params(&mut params).unwrap();
    }

    fn add_buffer(&self, raw: *mut pw_buffer) {
        // SAFETY: The name is a C string, and the descriptor is new and ours.
        let memory = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
            let fd = libc::memfd_create(c"painter".as_ptr(), flags);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        memory.set_len(self.canvas.bytes.into()).unwrap();
        if self.canvas.sealed {
            // SAFETY: Plain fcntl on a descriptor of ours.
            let sealed =
                unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
            assert_eq!(sealed, 0);
        }
        // SAFETY: PipeWire passes a buffer with one block, as was asked for, to be filled in.
        unsafe {
            let data = &mut *(*(*raw).buffer).datas;
            data.type_ = self.canvas.memory();
            data.flags = spa_sys::SPA_DATA_FLAG_READWRITE;
            data.fd = memory.as_raw_fd().into();
            data.mapoffset = 0;
            data.maxsize = self.canvas.announced;
        }
        self.memory.borrow_mut().insert(raw, memory);
    }

    /// Shows the next picture. False where there is none, or no buffer for it.
    fn paint(&self, stream: &Stream) -> bool {
        let Some(picture) = self.pictures.borrow_mut().pop_front() else {
            return false;
        };
        // SAFETY: It is queued below, or put off when there is none.
        let raw = unsafe { stream.dequeue_raw_buffer() };
        if raw.is_null() {
            self.pictures.borrow_mut().push_front(picture);
            return false;
        }
        let memory = self.memory.borrow();
        memory[&raw].write_all_at(&picture.bytes, 0).unwrap();
        // SAFETY: The buffer is ours until it is queued; its chunk and metadata are shared memory
        // that PipeWire has set up for us to write.
        unsafe {
            let buffer = &*(*raw).buffer;
            let chunk = &mut *(*buffer.datas).chunk;
            chunk.offset = picture.offset;
            chunk.size = picture.size;
            chunk.stride = picture.stride;
            chunk.flags = picture.chunk_flags;
            for meta in std::slice::from_raw_parts(buffer.metas, buffer.n_metas as usize) {
                if meta.type_ == spa_sys::SPA_META_Header {
                    let header = &mut *meta.data.cast::<spa_sys::spa_meta_header>();
                    header.flags = picture.header_flags;
                    header.pts = picture.captured.unwrap_or(-1);
                } else if meta.type_ == spa_sys::SPA_META_VideoCrop {
                    let crop = picture.crop.unwrap_or_default();
                    meta.data.cast::<spa_sys::spa_region>().write(region(crop));
                } else if meta.type_ == spa_sys::SPA_META_VideoDamage {
                    let list = picture.damage.iter().copied().chain([(0, 0, 0, 0)]);
                    for (index, rect) in list.take(4).enumerate() {
                        let place = meta.data.cast::<spa_sys::spa_region>().add(index);
                        place.write(region(rect));
                    }
                } else if meta.type_ == spa_sys::SPA_META_VideoTransform {
                    meta.data.cast::<u32>().write(picture.transform);
                } else if meta.type_ == spa_sys::SPA_META_Cursor {
                    let bytes = cursor_bytes(picture.cursor.as_ref());
                    let place = meta.data.cast::<u8>();
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len());
                }
            }
            stream.queue_raw_buffer(raw);
        }
        true
    }
}

fn region((x, y, width, height): (i32, i32, u32, u32)) -> spa_sys::spa_region {
    spa_sys::spa_region {
        position: spa_sys::spa_point { x, y },
        size: spa_sys::spa_rectangle { width, height },
    }
}

/// A pointer as SPA_META_Cursor has it.
fn cursor_bytes(cursor: Option<&Cursor>) -> Vec<u8> {
    // id, flags, position, hotspot, bitmap_offset
    let mut words = vec![0; 7];
    let mut pixels: &[u8] = &[];
    if let Some(cursor) = cursor {
        let ((x, y), (left, top)) = (cursor.position, cursor.hotspot);
        words = vec![1, 0, x as u32, y as u32, left as u32, top as u32, 0];
        if let Some((width, height, bitmap)) = &cursor.bitmap {
            words[6] = 28;
            let format = PixelFormat::Bgra.spa().as_raw();
            words.extend([format, *width, *height, width * 4, 20]);
            pixels = bitmap;
        }
    }
    let words = words.into_iter().flat_map(u32::to_ne_bytes);
    words.chain(pixels.iter().copied()).collect()
}

fn pod(type_: SpaTypes, id: ParamType, properties: Vec<Property>) -> Vec<u8> {
    let object = Value::Object(Object {
        type_: type_.as_raw(),
        id: id.as_raw(),
        properties,
    });
    PodSerializer::serialize(io::Cursor::new(Vec::new()), &object)
        .unwrap()
        .0
        .into_inner()
}
