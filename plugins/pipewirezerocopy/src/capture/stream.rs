// SPDX-License-Identifier: MIT OR Apache-2.0

//! One PipeWire stream: its callbacks, and the buffers that it has.
//!
//! The callbacks run on the loop thread, inside PipeWire. They note facts, answer formats and hand
//! frames on. What follows from the facts is decided by the worker, outside any callback, where a
//! stream may be destroyed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use libspa::param::ParamType;
use libspa::pod::Pod;
use libspa::sys as spa_sys;
use libspa::utils::Direction;
use pipewire::core::CoreRc;
use pipewire::properties::properties;
use pipewire::stream::{Stream, StreamFlags, StreamListener, StreamRc, StreamState};
use pipewire::sys::pw_buffer;

use super::buffers::Buffer;
use super::damage::Damage;
use super::frame::{Frame, Lease, Pool};
use super::memory::page_size;
use super::meta::{Cursor, Metas, Users};
use super::negotiate::{self, Fixed, PodBytes, StreamFormat};
use super::offer::Offer;
use super::raw::{Chunks, datas, metas};
use super::registry::Node;
use super::timeline;
use super::waits::Waits;
use super::worker::Link;
use super::{Level, Monotonic, Stage};

/// Why a buffer holds no frame.
enum Skip {
    /// It carries metadata only.
    Empty,
    /// The producer says so, or its numbers cannot be: then this says which.
    Corrupted(Option<String>),
}

/// What the callbacks know.
struct State {
    link: Rc<Link>,
    /// All here know explicit synchronization; the producer may.
    timelines: bool,
    format: Cell<Option<StreamFormat>>,
    /// A format whose modifier the producer is to choose.
    open: Cell<Option<StreamFormat>>,
    /// What the producer was last told that we take.
    offer: RefCell<Offer>,
    /// By our number for them, with the address that PipeWire knows them by.
    buffers: RefCell<BTreeMap<u64, (*mut pw_buffer, Buffer)>>,
    /// Who has them, as far as that is counted.
    users: RefCell<Vec<(u64, Users)>>,
    /// The metadata of one buffer lies over that of another: what is counted there is not to be trusted.
    muddled: Cell<bool>,
    /// Counts the buffers of this generation.
    pool: RefCell<Arc<Pool>>,
    /// The producer lacks buffers that were out when they were taken away.
    lost: Cell<bool>,
    /// It lacked some before this stream began.
    lost_before: Cell<bool>,
    /// Something was drawn that never came: the next frame's damage does not cover it.
    missed: Cell<bool>,
    /// The pointer, as the producer last said.
    cursor: RefCell<Cursor>,
    error: RefCell<Option<String>>,
    had_format: Cell<bool>,
    waits: Waits,
    /// An unreadable frame was reported; more of them are only traced.
    complained: Cell<bool>,
}

/// A stream that is connected, or about to be.
pub(super) struct CaptureStream {
    state: Rc<State>,
    // Before the stream: a listener must not outlive what it listens to.
    _listener: StreamListener<()>,
    stream: StreamRc,
}

impl CaptureStream {
    /// Sets up a stream that takes `offer` from the node. `lost_before`: what [`has_lost`](Self::has_lost)
    /// said of the stream before it.
    pub fn connect(
        core: CoreRc,
        link: Rc<Link>,
        name: &str,
        (id, node): (u32, &Node),
        offer: &Offer,
        timelines: bool,
        lost_before: bool,
    ) -> Result<Self, pipewire::Error> {
        // Without the first three, WirePlumber does not link the stream (L3). A stream whose
        // node is gone must not be linked to whatever other source of video there is.
        let mut properties = properties! {
            *pipewire::keys::MEDIA_TYPE => "Video",
            *pipewire::keys::MEDIA_CATEGORY => "Capture",
            *pipewire::keys::MEDIA_ROLE => "Screen",
            *pipewire::keys::NODE_NAME => name,
            "node.dont-reconnect" => "true",
            "node.dont-fallback" => "true",
        };
        if let Some(serial) = &node.serial {
            properties.insert("target.object", serial.as_str());
        }
        let stream = StreamRc::new(core, name, properties)?;
        let library = pipewire_version();
        let timelines = timelines && link.sync.is_some() && timeline::is_known_to(&library);
        let state = Rc::new(State::new(link, offer.clone(), timelines));
        state.lost_before.set(lost_before);
        let listener = listen(&stream, &state)?;
        let pods = offer.pods();
        let mut params: Vec<&Pod> = pods.iter().map(PodBytes::pod).collect();
        state.link.counters.set_stage(Stage::Linking);
        stream.connect(
            Direction::Input,
            Some(id),
            StreamFlags::AUTOCONNECT | StreamFlags::DONT_RECONNECT,
            &mut params,
        )?;
        Ok(Self {
            state,
            _listener: listener,
            stream,
        })
    }

    /// Replaces what is offered to the producer.
    pub fn renegotiate(&self, offer: &Offer) -> Result<(), pipewire::Error> {
        let state = &self.state;
        state.offer.replace(offer.clone());
        // One that has not answered the last offer may not be linked yet.
        let answers = state.format.get().is_some() || state.open.take().is_some();
        if answers || state.waits.is_answer_pending() {
            state.waits.offered();
        }
        self.offer_pods(&offer.pods())
    }

    /// Notes that the stream was linked to the producer, which is to fix its first format now.
    pub fn see_link(&self) {
        let state = &self.state;
        if state.open.get().is_none() && !state.waits.is_answer_pending() {
            state.waits.offered();
            state.link.counters.set_stage(Stage::Negotiating);
        }
    }

    /// Chooses the modifier that the producer has left open, as the producer should have done: by
    /// offering that one before the rest.
    pub fn choose_modifier(&self) -> Result<(), pipewire::Error> {
        let Some(format) = self.state.open.take() else {
            return Ok(());
        };
        self.state.waits.offered();
        let mut pods = vec![format.pod()];
        pods.extend(self.state.offer.borrow().pods());
        self.offer_pods(&pods)
    }

    fn offer_pods(&self, pods: &[PodBytes]) -> Result<(), pipewire::Error> {
        let mut params: Vec<&Pod> = pods.iter().map(PodBytes::pod).collect();
        self.stream.update_params(&mut params)
    }

    /// Gives the producer the buffers back that have returned.
    pub fn take_back(&self) {
        self.state.take_back(&self.stream);
    }

    /// Gives all buffers back before the stream ends, those that somebody still reads as well:
    /// what is in them becomes a copy at its place.
    ///
    /// Producers keep their buffers for the next consumer. mutter never gets one back that was out
    /// when the consumer went, and after as many such ends as it has buffers it streams no more.
    pub fn reclaim(&self) {
        let mut buffers = self.state.buffers.borrow_mut();
        for (raw, buffer) in buffers.values_mut().filter(|(_, buffer)| buffer.out) {
            if let Err(error) = buffer.detach() {
                self.state.log(
                    Level::Warning,
                    format_args!("a buffer stays with its reader, for want of memory: {error}"),
                );
                continue;
            }
            // SAFETY: As in `take_back`.
            unsafe { self.state.give_back(&self.stream, *raw, buffer) };
        }
    }

    /// Whether the producer lacks buffers that went with a link while somebody had them. It keeps the
    /// rest for the next link, and streams no more when none is left.
    pub fn has_lost(&self) -> bool {
        self.state.lost.get() || self.state.lost_before.get()
    }

    /// Whether the producer goes on with what it has left of such buffers, and needs new ones.
    pub fn needs_buffers(&self) -> bool {
        self.state.lost.get() && !self.state.buffers.borrow().is_empty()
    }

    /// Has new buffers made. They go with the format, and an offer has that fixed anew.
    pub fn renew_buffers(&self) -> Result<(), pipewire::Error> {
        self.state.lost.set(false);
        self.state.waits.offered();
        let pods = self.state.offer.borrow().pods();
        self.offer_pods(&pods)
    }

    /// Whether a format was ever agreed on.
    pub fn had_format(&self) -> bool {
        self.state.had_format.get()
    }

    /// What is wrong with the stream, said once.
    pub fn take_error(&self) -> Option<String> {
        self.state.error.borrow_mut().take()
    }

    /// What is waited for.
    pub fn waits(&self) -> &Waits {
        &self.state.waits
    }

    /// The stream's own node.
    pub fn node_id(&self) -> u32 {
        self.stream.node_id()
    }

    /// Asks the producer for a frame by pausing the stream and letting it go on.
    ///
    /// mutter draws a frame when a stream begins. It loses that one when its buffers come too
    /// late, and draws none when a new format resizes a virtual monitor: with nothing moving on
    /// the screen there would be no picture until something does.
    pub fn ask_for_frame(&self) -> Result<(), pipewire::Error> {
        self.state.waits.frame_asked();
        self.stream.set_active(false)?;
        self.stream.set_active(true)
    }
}

/// The version of the library that this process has, whichever it was built with.
fn pipewire_version() -> String {
    // SAFETY: It returns a string that is never freed.
    let version = unsafe { CStr::from_ptr(pipewire::sys::pw_get_library_version()) };
    version.to_string_lossy().into_owned()
}

fn listen(stream: &StreamRc, state: &Rc<State>) -> Result<StreamListener<()>, pipewire::Error> {
    let with = |state: &Rc<State>| state.clone();
    stream
        .add_local_listener::<()>()
        .state_changed({
            let state = with(state);
            move |_, (), old, new| state.state_changed(&old, new)
        })
        .param_changed({
            let state = with(state);
            move |stream, (), id, pod| {
                if id == ParamType::Format.as_raw() {
                    state.format_changed(stream, pod);
                }
            }
        })
        .add_buffer({
            let state = with(state);
            move |_, (), raw| state.add_buffer(raw)
        })
        .remove_buffer({
            let state = with(state);
            move |_, (), raw| state.remove_buffer(raw)
        })
        .process({
            let state = with(state);
            move |stream, ()| state.process(stream)
        })
        .register()
}

impl State {
    fn new(link: Rc<Link>, offer: Offer, timelines: bool) -> Self {
        Self {
            link,
            timelines,
            format: Cell::default(),
            open: Cell::default(),
            offer: RefCell::new(offer),
            buffers: RefCell::default(),
            users: RefCell::default(),
            muddled: Cell::default(),
            pool: RefCell::default(),
            lost: Cell::default(),
            lost_before: Cell::default(),
            missed: Cell::new(true),
            cursor: RefCell::default(),
            error: RefCell::default(),
            had_format: Cell::default(),
            waits: Waits::default(),
            complained: Cell::default(),
        }
    }

    fn log(&self, level: Level, message: std::fmt::Arguments<'_>) {
        (self.link.log)(level, message);
    }

    fn state_changed(&self, old: &StreamState, new: StreamState) {
        self.log(Level::Debug, format_args!("stream: {old:?} -> {new:?}"));
        let stage = match new {
            StreamState::Error(text) => {
                self.error.borrow_mut().get_or_insert(text);
                return;
            }
            StreamState::Unconnected => {
                // WirePlumber 0.4 does this to a stream whose target is gone (L2).
                if *old != StreamState::Unconnected {
                    self.waits.producer_gone();
                }
                Stage::Linking
            }
            StreamState::Connecting => Stage::Linking,
            // Linked or not.
            StreamState::Paused if self.format.get().is_none() => return,
            StreamState::Paused => Stage::Paused,
            StreamState::Streaming => Stage::Streaming,
        };
        self.link.counters.set_stage(stage);
    }

    fn format_changed(&self, stream: &Stream, pod: Option<&Pod>) {
        let Some(pod) = pod else {
            self.log(Level::Debug, format_args!("format cleared"));
            self.format.set(None);
            self.open.set(None);
            self.waits.format_cleared();
            self.link.counters.set_stage(Stage::Negotiating);
            return;
        };
        let format = match StreamFormat::parse(pod) {
            Ok(Fixed::Format(format)) => format,
            Ok(Fixed::Choice(format, modifiers)) => {
                self.log(
                    Level::Debug,
                    format_args!("the producer is to choose a modifier of {modifiers:x?}"),
                );
                self.format.set(None);
                self.open.set(Some(format));
                self.waits.format_open();
                return;
            }
            Err(what) => {
                self.format.set(None);
                self.error
                    .borrow_mut()
                    .get_or_insert(format!("the producer fixed {what}"));
                return;
            }
        };
        self.log(Level::Info, format_args!("producer fixed {format:?}"));
        self.format.set(Some(format));
        self.open.set(None);
        self.missed.set(true);
        // The first of a stream may be one that the producer had before, with its buffers.
        self.lost.set(self.lost_before.take());
        self.had_format.set(true);
        self.waits.format_fixed(format.framerate.0 > 0);
        self.link.counters.set_stage(Stage::Paused);
        // Each Format needs its own answers, also when it is the same as before (L5).
        let answers = negotiate::format_answers(&format, self.timelines);
        let mut params: Vec<&Pod> = answers.iter().map(PodBytes::pod).collect();
        if let Err(error) = stream.update_params(&mut params) {
            self.error
                .borrow_mut()
                .get_or_insert(format!("answering the format failed: {error}"));
        }
    }

    fn add_buffer(&self, raw: *mut pw_buffer) {
        self.waits.buffer_added();
        let id = self.link.next_buffer.get();
        self.link.next_buffer.set(id + 1);
        // SAFETY: PipeWire passes a buffer that is valid until remove_buffer; what it has lies in
        // this process.
        let buffer = unsafe {
            let remains = self.link.inbox.remains();
            Buffer::open(id, datas(raw), self.link.sync.as_ref(), remains, |error| {
                self.log(
                    Level::Warning,
                    format_args!("a buffer is not all that was agreed on: {error}"),
                );
            })
        };
        self.log(
            Level::Debug,
            format_args!("buffer added: {}", buffer.describe()),
        );
        let mut buffers = self.buffers.borrow_mut();
        if buffers.is_empty() {
            // A new generation: what is still out of the last one does not count for it.
            self.pool.replace(Arc::default());
            self.muddled.set(false);
        }
        // SAFETY: PipeWire has added all of them, and not yet removed any.
        let start = |raw| unsafe { Metas::new(metas(raw)) }.start();
        let others = buffers.values().map(|(other, _)| start(*other));
        if !self.muddled.get() && is_mapped_wrongly(start(raw), others) {
            self.muddled.set(true);
            self.log(
                Level::Warning,
                format_args!(
                    "PipeWire has mixed up the metadata of buffers: pictures in shared memory are copied, \
                     as the producer may draw into those that somebody has. With fewer buffers it would not"
                ),
            );
        }
        self.pool.borrow().add();
        // SAFETY: It is PipeWire's own structure, valid as above, and the field is ours.
        unsafe { (*raw).user_data = std::ptr::without_provenance_mut(id as usize) };
        // SAFETY: As above; it is forgotten in remove_buffer.
        let users = unsafe { Metas::new(metas(raw)) }.users();
        self.users
            .borrow_mut()
            .extend(users.map(|users| (id, users)));
        buffers.insert(id, (raw, buffer));
    }

    fn remove_buffer(&self, raw: *mut pw_buffer) {
        let mut buffers = self.buffers.borrow_mut();
        // SAFETY: PipeWire passes a buffer that is valid until this returns.
        if let Some((_, mut buffer)) = buffers.remove(&unsafe { number(raw) }) {
            self.users.borrow_mut().retain(|(id, _)| *id != buffer.id);
            self.pool.borrow().remove();
            self.lost.set(self.lost.get() || buffer.out);
            self.end_loan(&mut buffer);
        }
        if buffers.is_empty() {
            self.log(
                Level::Debug,
                format_args!("the producer's buffers are gone"),
            );
            self.waits.producer_gone();
        }
    }

    /// Takes all buffers that have come; the newest frame is what remains in the inbox. What has
    /// returned goes back first: PipeWire passes it on when this ends.
    fn process(&self, stream: &Stream) {
        self.take_back(stream);
        loop {
            // SAFETY: A buffer that is not null is given back: below, or by the frame's lease.
            let raw = unsafe { stream.dequeue_raw_buffer() };
            if raw.is_null() {
                return;
            }
            match self.frame(raw) {
                Ok(frame) => {
                    self.waits.frame_came();
                    self.link.counters.received.fetch_add(1, Ordering::Relaxed);
                    self.link.inbox.put_frame(frame);
                    continue;
                }
                Err(skip) => self.see_skipped(skip),
            }
            // SAFETY: It was dequeued above, and no frame was made of it.
            unsafe {
                match self.buffers.borrow_mut().get_mut(&number(raw)) {
                    Some((_, buffer)) => self.give_back(stream, raw, buffer),
                    None => stream.queue_raw_buffer(raw),
                }
            }
        }
    }

    /// Counts a buffer that no frame was made of.
    #[cold]
    fn see_skipped(&self, skip: Skip) {
        let Skip::Corrupted(why) = skip else {
            self.link.counters.empty.fetch_add(1, Ordering::Relaxed);
            return;
        };
        self.link.counters.corrupted.fetch_add(1, Ordering::Relaxed);
        self.missed.set(true);
        let why = why.unwrap_or_else(|| "marked as corrupted".into());
        let level = if self.complained.replace(true) {
            Level::Trace
        } else {
            Level::Warning
        };
        self.log(level, format_args!("frame skipped: {why}"));
    }

    /// The pointer has changed. A frame that came with it may follow.
    #[inline(never)]
    fn see_cursor(&self, cursor: Cursor, frame_follows: bool) {
        let shown = if cursor.bitmap.is_some() {
            "visible"
        } else {
            "hidden"
        };
        self.log(
            Level::Trace,
            format_args!("pointer at {:?}, {shown}", cursor.position),
        );
        self.cursor.replace(cursor.clone());
        self.link.inbox.put_cursor(cursor, frame_follows);
    }

    /// Gives the buffers back that have returned, but for those that were removed meanwhile.
    fn take_back(&self, stream: &Stream) {
        while let Some(id) = self.link.returns.next() {
            let mut buffers = self.buffers.borrow_mut();
            let found = buffers.get_mut(&id).filter(|(_, buffer)| buffer.out);
            if let Some((raw, buffer)) = found {
                // SAFETY: The buffer was dequeued from this stream, whose list of buffers still has
                // it, and it is given back only once: `out` says.
                unsafe { self.give_back(stream, *raw, buffer) };
            }
            drop(buffers);
            self.link.inbox.put_returned();
        }
    }

    /// Gives a buffer back to the producer.
    ///
    /// # Safety
    /// `raw` must be dequeued from this stream, and `buffer` what is known of it.
    unsafe fn give_back(&self, stream: &Stream, raw: *mut pw_buffer, buffer: &mut Buffer) {
        self.end_loan(buffer);
        // SAFETY: By the contract above.
        unsafe { stream.queue_raw_buffer(raw) };
    }

    /// Tells the producer, where it waits for that, that it may draw into a buffer, which it gets
    /// back or has taken away.
    fn end_loan(&self, buffer: &mut Buffer) {
        if buffer.out {
            self.pool.borrow().end_loan();
        }
        if let Err(error) = buffer.goes() {
            self.log(
                Level::Warning,
                format_args!("the producer is not told that it may draw: {error}"),
            );
        }
    }

    /// How many of the buffers somebody has: all, where that cannot be known.
    fn in_use(&self) -> usize {
        if self.muddled.get() {
            return usize::MAX;
        }
        let users = self.users.borrow();
        // SAFETY: The buffer is in our list, so PipeWire has added and not yet removed it.
        let used = users
            .iter()
            .filter(|(_, users)| unsafe { users.count() > 0 });
        used.count()
    }

    /// The frame in a buffer that has just been dequeued.
    fn frame(&self, raw: *mut pw_buffer) -> Result<Box<Frame>, Skip> {
        let received = Monotonic::now();
        self.pool.borrow().see_in_use(self.in_use());
        let mut buffers = self.buffers.borrow_mut();
        // SAFETY: PipeWire has added what it lets us dequeue.
        let Some((_, buffer)) = buffers.get_mut(&unsafe { number(raw) }) else {
            return Err(Skip::Corrupted(Some("its buffer was never added".into())));
        };
        // SAFETY: The buffer is in our list, so PipeWire has added and not yet removed it.
        let (datas, metas) = unsafe { (datas(raw), Metas::new(metas(raw))) };

        // Before anything can be wrong with it: the producer waits for its point in any case.
        let acquire = buffer.comes(metas.sync_timeline());
        if acquire.is_some() {
            metas.promise_release();
        }
        let Some(format) = self.format.get() else {
            return Err(Skip::Corrupted(Some("it belongs to no format".into())));
        };
        // SAFETY: As above.
        let chunks = unsafe { Chunks::read(datas) }.map_err(|what| Skip::Corrupted(Some(what)))?;
        let empty = chunks.are_empty(&format);
        let cursor = metas.cursor(&self.cursor.borrow());
        if let Some(cursor) = cursor {
            self.see_cursor(cursor, !empty);
        }
        if empty {
            return Err(Skip::Empty);
        }
        let header = metas.header();
        let marked = chunks.are_corrupted()
            || header.is_some_and(|h| h.flags & spa_sys::SPA_META_HEADER_FLAG_CORRUPTED != 0);
        if marked {
            return Err(Skip::Corrupted(None));
        }
        let (mut layout, pixels) = buffer
            .frame(&format, &chunks)
            .map_err(|what| Skip::Corrupted(Some(what)))?;
        if let Some(region) = metas.crop() {
            layout = layout.crop(region);
        }
        let damage = if self.missed.replace(false) {
            Damage::Everything
        } else {
            Damage::of_buffer(metas.damage(), &layout)
        };
        buffer.out = true;
        Ok(Box::new(Frame {
            layout,
            format: StreamFormat {
                width: layout.width,
                height: layout.height,
                ..format
            },
            captured: Monotonic::of_capture(header.map(|header| header.pts), received),
            damage,
            transform: metas.transform(),
            pixels,
            lease: Lease::new(
                buffer.id,
                acquire.is_some(),
                self.pool.borrow().clone(),
                self.link.returns.clone(),
                self.link.counters.clone(),
            ),
            acquire,
        }))
    }
}

impl Drop for State {
    /// The stream ends with buffers that were not given back: the daemon is gone, not the producer.
    fn drop(&mut self) {
        for (_, buffer) in std::mem::take(self.buffers.get_mut()).values_mut() {
            self.end_loan(buffer);
        }
    }
}

/// Whether a buffer whose metadata begins at `start` has been given that of another, after `others` were
/// added.
///
/// The metadata of a node's buffers lies in one file, in the order in which they are added. For one that
/// crosses the border of a page libpipewire maps both pages. It finds the next ones in that mapping, but
/// takes their place in their page, the second one, for a place in the first (`pw_memblock_map`, 0.3.65 to 1.4
/// at least): they come before the one that crosses.
fn is_mapped_wrongly(
    start: Option<usize>,
    mut others: impl Iterator<Item = Option<usize>>,
) -> bool {
    let page = page_size();
    let comes_before = |start: usize, other| start < other && start / page == other / page;
    start.is_some_and(|start| others.any(|other| other.is_some_and(|it| comes_before(start, it))))
}

/// Our number for a buffer, 0 for one that was never added.
///
/// # Safety
/// `raw` must be valid.
unsafe fn number(raw: *mut pw_buffer) -> u64 {
    // SAFETY: By the contract above. The field is set by `add_buffer` alone.
    unsafe { (*raw).user_data }.addr() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::buffers::tests::{with_timelines, without_timelines};
    use crate::capture::frame::Returns;
    use crate::capture::timeline::{SPA_META_SYNC_TIMELINE, SyncTimelineMeta, UNSCHEDULED_RELEASE};
    use crate::capture::{Counters, Inbox};
    use std::sync::Mutex;
    use zerocopy_plugin_common::wait::Waiter;

    /// A stream's state, and what it has warned of.
    fn state() -> (State, Arc<Mutex<Vec<String>>>) {
        let counters = Arc::new(Counters::default());
        let waiter = Waiter::new().unwrap();
        let warnings = Arc::<Mutex<Vec<String>>>::default();
        let (commands, _receiver) = pipewire::channel::channel();
        let link = Link {
            inbox: Arc::new(Inbox::new(waiter.waker(), counters.clone())),
            counters,
            returns: Arc::new(Returns::new(commands)),
            log: Arc::new({
                let warnings = warnings.clone();
                move |level, text| {
                    if level == Level::Warning {
                        warnings.lock().unwrap().push(text.to_string());
                    }
                }
            }),
            sync: None,
            next_buffer: Cell::new(0),
        };
        (State::new(Rc::new(link), Offer::default(), true), warnings)
    }

    /// A buffer of PipeWire's without pixels, with these points, which a state knows.
    struct Coming {
        raw: pw_buffer,
        _buffer: Box<spa_sys::spa_buffer>,
        _meta: Box<spa_sys::spa_meta>,
        points: Box<SyncTimelineMeta>,
    }

    fn coming() -> Coming {
        let mut points = Box::new(SyncTimelineMeta {
            flags: UNSCHEDULED_RELEASE,
            padding: 0,
            acquire_point: 1,
            release_point: 2,
        });
        let mut meta = Box::new(spa_sys::spa_meta {
            type_: SPA_META_SYNC_TIMELINE,
            size: size_of::<SyncTimelineMeta>() as u32,
            data: (&raw mut *points).cast(),
        });
        let mut buffer = Box::new(spa_sys::spa_buffer {
            n_metas: 1,
            n_datas: 0,
            metas: &raw mut *meta,
            datas: std::ptr::null_mut(),
        });
        // SAFETY: A structure of integers and pointers.
        let mut raw: pw_buffer = unsafe { std::mem::zeroed() };
        raw.buffer = &raw mut *buffer;
        Coming {
            raw,
            _buffer: buffer,
            _meta: meta,
            points,
        }
    }

    #[test]
    fn metadata_that_is_mapped_before_what_comes_before_it_is_mapped_wrongly() {
        let page = page_size();
        let first = Some(7 * page + 4000);
        assert!(is_mapped_wrongly(
            Some(7 * page + 500),
            [None, first].into_iter()
        ));
        for right in [None, Some(7 * page + 4090), Some(8 * page), Some(2 * page)] {
            assert!(
                !is_mapped_wrongly(right, [None, first].into_iter()),
                "{right:?}"
            );
        }
    }

    #[test]
    fn a_release_point_is_signalled_whatever_becomes_of_the_buffer() {
        // Signalling what is no timeline fails, which shows that it was tried.
        for what in ["removed", "the stream has ended"] {
            let (state, warnings) = state();
            let mut coming = coming();
            let raw = &raw mut coming.raw;
            state
                .buffers
                .borrow_mut()
                .insert(0, (raw, with_timelines(1)));
            assert!(state.frame(raw).is_err(), "there is no format");
            assert!(warnings.lock().unwrap().is_empty());
            if what == "removed" {
                state.remove_buffer(raw);
            }
            drop(state);
            let warnings = warnings.lock().unwrap();
            assert_eq!(warnings.len(), 1, "{what}: {warnings:?}");
            assert!(warnings[0].contains("not told that it may draw"), "{what}");
        }
    }

    #[test]
    fn a_release_is_promised_where_it_can_be_kept() {
        for (buffer, promised) in [(with_timelines(1), true), (without_timelines(1), false)] {
            let (state, _) = state();
            let mut coming = coming();
            let raw = &raw mut coming.raw;
            state.buffers.borrow_mut().insert(0, (raw, buffer));
            assert!(state.frame(raw).is_err(), "there is no format");
            assert_eq!(coming.points.flags & UNSCHEDULED_RELEASE == 0, promised);
        }
    }
}
