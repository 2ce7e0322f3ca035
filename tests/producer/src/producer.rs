// SPDX-License-Identifier: MIT OR Apache-2.0

//! A producer of DMA-BUFs that does what it is told, when it is told: pictures, other formats in
//! mid-stream, and drawing that ends only after the buffer has left.
//!
//! It is a PipeWire stream on a thread of its own. What happens there is told in [`Event`]s.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libspa::param::ParamType;
use libspa::pod::Pod;
use libspa::sys as spa_sys;
use libspa::utils::Direction;
use pipewire::channel::{Receiver, Sender};
use pipewire::context::ContextRc;
use pipewire::main_loop::MainLoopRc;
use pipewire::properties::properties;
use pipewire::stream::{Stream, StreamFlags, StreamRc, StreamState};
use pipewire::sys::pw_buffer;

use crate::Outcome;
use crate::pods::{
    Agreed, DATA_SYNC_OBJ, META_SYNC_TIMELINE, Modifier, Offer, SyncTimeline, UNSCHEDULED_RELEASE,
    answers,
};
use crate::timelines::{Release, SyncNode, Timelines};
use crate::workshop::{Canvas, Signal, Workshop};

/// How often a picture is shown, if there is one: a driver's cycle.
const CYCLE: Duration = Duration::from_millis(10);
/// What is seen in a buffer that is read before it is drawn.
pub const STALE: u8 = 0xff;

/// When a picture is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before its buffer leaves.
    Before,
    /// At [`Producer::finish`]; the buffer shows [`STALE`] until then.
    After,
}

/// What has happened.
#[derive(Debug)]
pub enum Event {
    /// A format was agreed on, with this modifier; none for shared memory.
    Format(Option<u64>),
    /// A picture's buffer has left.
    Shown(Shown),
    /// The late picture is drawn.
    Finished,
    /// Nothing more comes.
    Broken(String),
}

/// A picture that has left.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The host's number of its buffer, where virtio-gpu made it.
    pub resource: Option<u32>,
    /// With explicit sync, the point at which its buffer is free again.
    pub release: Option<Release>,
    /// With explicit sync, whether the consumer had promised a release of what the buffer showed before.
    pub promised: Option<bool>,
}

enum Command {
    Show(u8, When),
    Finish,
    Offer(Offer),
    Quit,
}

/// The producer.
pub struct Producer {
    commands: Sender<Command>,
    events: mpsc::Receiver<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Producer {
    /// A node of that name. With a node for timelines, explicit sync is offered with its DMA-BUFs.
    pub fn start(
        name: &str,
        offer: Offer,
        workshop: impl Workshop + Send + 'static,
        sync: Option<Arc<SyncNode>>,
    ) -> Outcome<Self> {
        let (commands, receiver) = pipewire::channel::channel();
        let (sender, events) = mpsc::channel();
        let name = name.to_owned();
        let thread = std::thread::spawn(move || {
            if let Err(error) = run(&name, offer, Box::new(workshop), sync, receiver, &sender) {
                let _ = sender.send(Event::Broken(error.to_string()));
            }
        });
        Ok(Self {
            commands,
            events,
            thread: Some(thread),
        })
    }

    /// Shows a picture as soon as there is a buffer for it and somebody to take it.
    pub fn show(&self, number: u8, when: When) {
        self.tell(Command::Show(number, when));
    }

    /// Draws the last picture that was to be drawn later.
    pub fn finish(&self) {
        self.tell(Command::Finish);
    }

    /// Offers something else from now on.
    pub fn offer(&self, offer: Offer) {
        self.tell(Command::Offer(offer));
    }

    /// The next event that `wanted` takes, if it comes in time.
    pub fn wait<T>(&self, limit: Duration, wanted: impl Fn(Event) -> Option<T>) -> Outcome<T> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Broken(why)) => return Err(format!("the producer: {why}").into()),
                Ok(event) => {
                    if let Some(found) = wanted(event) {
                        return Ok(found);
                    }
                }
                Err(_) => return Err(format!("nothing from the producer within {limit:?}").into()),
            }
        }
    }

    fn tell(&self, command: Command) {
        // Where its thread has ended, the next wait says why.
        let _ = self.commands.send(command);
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        self.tell(Command::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A buffer of the stream.
struct Buffer {
    canvas: Box<dyn Canvas>,
    sync: Option<Sync>,
}

/// Explicit sync of a buffer.
struct Sync {
    timelines: Timelines,
    /// As PipeWire has them.
    _descriptors: [OwnedFd; 2],
    /// The last point that was used.
    point: u64,
}

/// What has left without being drawn.
struct Late {
    raw: *mut pw_buffer,
    number: u8,
    signal: Option<Signal>,
}

/// What the callbacks share.
struct State {
    workshop: RefCell<Box<dyn Workshop>>,
    sync: Option<Arc<SyncNode>>,
    offer: RefCell<Offer>,
    agreed: RefCell<Option<Agreed>>,
    pictures: RefCell<VecDeque<(u8, When)>>,
    buffers: RefCell<HashMap<*mut pw_buffer, Buffer>>,
    /// Those that are ours now.
    free: RefCell<VecDeque<*mut pw_buffer>>,
    late: RefCell<Option<Late>>,
    events: mpsc::Sender<Event>,
}

fn run(
    name: &str,
    offer: Offer,
    workshop: Box<dyn Workshop>,
    sync: Option<Arc<SyncNode>>,
    receiver: Receiver<Command>,
    events: &mpsc::Sender<Event>,
) -> Outcome<()> {
    pipewire::init();
    let main_loop = MainLoopRc::new(None)?;
    let context = ContextRc::new(&main_loop, None)?;
    let core = context.connect_rc(None)?;
    let stream = StreamRc::new(
        core,
        name,
        properties! {
            *pipewire::keys::MEDIA_TYPE => "Video",
            *pipewire::keys::MEDIA_CLASS => "Video/Source",
            *pipewire::keys::NODE_NAME => name,
        },
    )?;
    let offered = offer.pods(None);
    let state = Rc::new(State {
        workshop: RefCell::new(workshop),
        sync,
        offer: RefCell::new(offer),
        agreed: RefCell::default(),
        pictures: RefCell::default(),
        buffers: RefCell::default(),
        free: RefCell::default(),
        late: RefCell::default(),
        events: events.clone(),
    });
    let shared = || state.clone();
    let _listener = stream
        .add_local_listener::<()>()
        .param_changed({
            let state = shared();
            move |stream, (), id, pod| {
                if id == ParamType::Format.as_raw() {
                    state.note(state.format_changed(stream, pod));
                }
            }
        })
        .add_buffer({
            let state = shared();
            move |_, (), raw| state.note(state.add_buffer(raw))
        })
        .remove_buffer({
            let state = shared();
            move |_, (), raw| state.remove_buffer(raw)
        })
        .process({
            let state = shared();
            move |stream, ()| state.note(state.process(stream))
        })
        .register()?;
    stream.connect(
        Direction::Output,
        None,
        StreamFlags::DRIVER | StreamFlags::ALLOC_BUFFERS,
        &mut as_pods(&offered),
    )?;

    let timer = main_loop.loop_().add_timer({
        let (state, stream) = (shared(), stream.clone());
        move |_| {
            if !state.pictures.borrow().is_empty() && stream.state() == StreamState::Streaming {
                // SAFETY: The stream is alive, and this is its loop's thread.
                unsafe { pipewire::sys::pw_stream_trigger_process(stream.as_raw_ptr()) };
            }
        }
    });
    timer.update_timer(Some(CYCLE), Some(CYCLE)).into_result()?;

    let quit = main_loop.clone();
    let _receiver = receiver.attach(main_loop.loop_(), move |command| match command {
        Command::Show(number, when) => state.pictures.borrow_mut().push_back((number, when)),
        Command::Finish => state.note(state.finish()),
        Command::Offer(offer) => {
            let pods = offer.pods(None);
            state.offer.replace(offer);
            state.note(
                stream
                    .update_params(&mut as_pods(&pods))
                    .map_err(Into::into),
            );
        }
        Command::Quit => quit.quit(),
    });
    main_loop.run();
    Ok(())
}

fn as_pods(bytes: &[Vec<u8>]) -> Vec<&Pod> {
    let pod = |bytes| Pod::from_bytes(bytes).expect("the serializer writes whole pods");
    bytes.iter().map(|bytes| pod(bytes)).collect()
}

impl State {
    fn note(&self, result: Outcome<()>) {
        if let Err(error) = result {
            self.tell(Event::Broken(error.to_string()));
        }
    }

    fn tell(&self, event: Event) {
        // Nobody may be listening any more.
        let _ = self.events.send(event);
    }

    fn format_changed(&self, stream: &Stream, pod: Option<&Pod>) -> Outcome<()> {
        let agreed = match pod {
            Some(pod) => Some(Agreed::read(pod)?),
            None => None,
        };
        self.agreed.replace(agreed.clone());
        let Some(agreed) = agreed else {
            return Ok(());
        };
        let offer = self.offer.borrow().clone();
        let pods = match agreed.modifier {
            Modifier::Choose(both) => {
                // Ours to say, and the format is then told a second time, as mutter does (L5).
                let mut ours = offer.modifiers.iter();
                let best = ours.find(|modifier| both.contains(modifier));
                offer.pods(Some(*best.ok_or("modifiers that were not offered")?))
            }
            Modifier::Fixed(modifier) => {
                self.tell(Event::Format(Some(modifier)));
                let planes = agreed.pixels.planes(agreed.size).len();
                answers(
                    self.workshop.borrow().buffers(),
                    planes,
                    spa_sys::SPA_DATA_DmaBuf,
                    self.sync.is_some(),
                )
            }
            Modifier::None => {
                self.tell(Event::Format(None));
                let planes = agreed.pixels.planes(agreed.size).len();
                answers(
                    self.workshop.borrow().buffers(),
                    planes,
                    spa_sys::SPA_DATA_MemFd,
                    false,
                )
            }
        };
        Ok(stream.update_params(&mut as_pods(&pods))?)
    }

    fn add_buffer(&self, raw: *mut pw_buffer) -> Outcome<()> {
        let agreed = self.agreed.borrow().clone();
        let agreed = agreed.ok_or("buffers without a format")?;
        let mut workshop = self.workshop.borrow_mut();
        let canvas = workshop.make(&agreed)?;
        let kind = match agreed.modifier {
            Modifier::None => spa_sys::SPA_DATA_MemFd,
            _ => spa_sys::SPA_DATA_DmaBuf,
        };
        // SAFETY: PipeWire passes a buffer that is valid until remove_buffer, with that many blocks.
        let datas = unsafe {
            let buffer = &*(*raw).buffer;
            std::slice::from_raw_parts_mut(buffer.datas, buffer.n_datas as usize)
        };
        let mut planes = 0;
        for (data, block) in datas.iter_mut().zip(canvas.blocks()) {
            data.type_ = kind;
            data.flags = spa_sys::SPA_DATA_FLAG_READWRITE;
            data.fd = block.fd.as_raw_fd().into();
            data.mapoffset = 0;
            data.maxsize = if workshop.says_no_sizes() {
                0
            } else {
                block.size as u32
            };
            planes += 1;
        }
        let sync = match (&self.sync, &datas[planes..]) {
            (Some(node), [_, _]) => {
                let timelines = Timelines::new(node)?;
                let descriptors = timelines.descriptors()?;
                for (data, fd) in datas[planes..].iter_mut().zip(&descriptors) {
                    data.type_ = DATA_SYNC_OBJ;
                    data.flags = spa_sys::SPA_DATA_FLAG_READWRITE;
                    data.fd = fd.as_raw_fd().into();
                    data.mapoffset = 0;
                    data.maxsize = 0;
                }
                Some(Sync {
                    timelines,
                    _descriptors: descriptors,
                    point: 0,
                })
            }
            (_, []) => None,
            (_, more) => return Err(format!("{} blocks too many", more.len()).into()),
        };
        self.buffers
            .borrow_mut()
            .insert(raw, Buffer { canvas, sync });
        Ok(())
    }

    fn remove_buffer(&self, raw: *mut pw_buffer) {
        self.free.borrow_mut().retain(|free| *free != raw);
        self.late.borrow_mut().take_if(|late| late.raw == raw);
        self.buffers.borrow_mut().remove(&raw);
    }

    /// Fills the first buffer that is free.
    fn process(&self, stream: &Stream) -> Outcome<()> {
        let mut free = self.free.borrow_mut();
        loop {
            // SAFETY: It is queued below, in one of the next calls, or removed.
            let raw = unsafe { stream.dequeue_raw_buffer() };
            if raw.is_null() {
                break;
            }
            free.push_back(raw);
        }
        let mut buffers = self.buffers.borrow_mut();
        // A buffer that has come back may be in use until its release point is signalled, unless nobody
        // has promised that.
        let released = |raw: &*mut pw_buffer| {
            let sync = buffers.get(raw).and_then(|buffer| buffer.sync.as_ref());
            sync.is_none_or(|sync| {
                let release = sync.timelines.release(sync.point);
                // SAFETY: The buffer is ours until it is queued.
                let unseen = sync.point == 0 || unsafe { promised(*raw) } == Some(false);
                unseen || release.within(Duration::ZERO).unwrap_or(false)
            })
        };
        let Some(index) = free.iter().position(released) else {
            return Ok(());
        };
        let Some((number, when)) = self.pictures.borrow_mut().pop_front() else {
            return Ok(());
        };
        let Some(raw) = free.remove(index) else {
            return Ok(());
        };
        let buffer = buffers.get_mut(&raw).ok_or("a buffer that nobody made")?;
        let seen = match when {
            When::Before => number,
            When::After => STALE,
        };
        buffer.canvas.draw(seen, false)?;
        // SAFETY: The buffer is ours until it is queued.
        let promised = unsafe { promised(raw) };
        let promised = promised.filter(|_| buffer.sync.as_ref().is_some_and(|sync| sync.point > 0));
        let mut workshop = self.workshop.borrow_mut();
        let mut signal = None;
        match (&mut buffer.sync, when) {
            (Some(sync), _) => {
                sync.point += 1;
                match when {
                    When::Before => sync.timelines.signal(sync.point)?,
                    When::After => signal = workshop.promise(&sync.timelines, sync.point)?,
                }
            }
            (None, When::After) => signal = buffer.canvas.fence()?,
            (None, When::Before) => {}
        }
        // SAFETY: The buffer is ours until it is queued.
        unsafe { describe(raw, buffer, workshop.says_no_sizes()) };
        let release = |sync: &Sync| sync.timelines.release(sync.point);
        let shown = Shown {
            resource: buffer.canvas.resource(),
            release: buffer.sync.as_ref().map(release),
            promised,
        };
        if when == When::After {
            self.late.replace(Some(Late {
                raw,
                number,
                signal,
            }));
        }
        // SAFETY: It was dequeued above, or in an earlier call, and is queued once.
        unsafe { stream.queue_raw_buffer(raw) };
        self.tell(Event::Shown(shown));
        Ok(())
    }

    /// Draws the picture that has left undrawn, and says so to whoever waits for it.
    fn finish(&self) -> Outcome<()> {
        if let Some(late) = self.late.take() {
            let buffers = self.buffers.borrow();
            let buffer = buffers.get(&late.raw).ok_or("a buffer that nobody made")?;
            buffer.canvas.draw(late.number, true)?;
            match (late.signal, &buffer.sync) {
                (Some(signal), _) => signal()?,
                (None, Some(sync)) => sync.timelines.signal(sync.point)?,
                (None, None) => {}
            }
        }
        self.tell(Event::Finished);
        Ok(())
    }
}

/// Whether somebody has promised to signal the release point; none for buffers without one.
///
/// # Safety
/// As for [`describe`].
unsafe fn promised(raw: *mut pw_buffer) -> Option<bool> {
    // SAFETY: By the contract above; metadata is shared memory that PipeWire has set up.
    unsafe {
        let parts = &*(*raw).buffer;
        let metas = std::slice::from_raw_parts(parts.metas, parts.n_metas as usize);
        let meta = metas.iter().find(|meta| meta.type_ == META_SYNC_TIMELINE)?;
        let flags = meta.data.cast::<SyncTimeline>().read().flags;
        Some(flags & UNSCHEDULED_RELEASE == 0)
    }
}

/// Fills in what goes with each frame.
///
/// # Safety
/// `raw` must be a buffer that PipeWire has given us to write.
unsafe fn describe(raw: *mut pw_buffer, buffer: &Buffer, no_sizes: bool) {
    // SAFETY: By the contract above; chunks and metadata are shared memory that PipeWire has set up.
    unsafe {
        let parts = &*(*raw).buffer;
        let datas = std::slice::from_raw_parts(parts.datas, parts.n_datas as usize);
        for (data, block) in datas.iter().zip(buffer.canvas.blocks()) {
            (*data.chunk).offset = block.offset as u32;
            // 0 would say that there is no picture.
            (*data.chunk).size = if no_sizes { 1 } else { block.length as u32 };
            (*data.chunk).stride = block.stride as i32;
            (*data.chunk).flags = 0;
        }
        for meta in std::slice::from_raw_parts(parts.metas, parts.n_metas as usize) {
            if meta.type_ == spa_sys::SPA_META_Header {
                let header = &mut *meta.data.cast::<spa_sys::spa_meta_header>();
                header.flags = 0;
                header.pts = -1;
            } else if let (META_SYNC_TIMELINE, Some(sync)) = (meta.type_, &buffer.sync) {
                meta.data.cast::<SyncTimeline>().write(SyncTimeline {
                    flags: UNSCHEDULED_RELEASE,
                    padding: 0,
                    acquire_point: sync.point,
                    release_point: sync.point,
                });
            }
        }
    }
}
