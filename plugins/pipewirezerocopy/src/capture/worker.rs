// SPDX-License-Identifier: MIT OR Apache-2.0

//! The loop thread: connects, finds the target, keeps a stream on it, sees it vanish, and finds
//! a restarted daemon.
//!
//! PipeWire's callbacks only note what has happened. After each turn of the loop, outside any
//! callback, [`Worker::after_turn`] looks at the notes and acts on them. That is the one place
//! where streams are set up and destroyed, so none is destroyed under a callback of its own.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pipewire::channel::Receiver;
use pipewire::context::ContextRc;
use pipewire::core::{CoreRc, Listener};
use pipewire::loop_::{LoopRc, Timeout};
use pipewire::properties::properties;

use super::data_loop::{self, DataLoop};
use super::frame::Returns;
use super::registry::{Node, NodeList};
use super::stream::CaptureStream;
use super::timeline::{self, SyncNode};
use super::waits::is_due;
use super::{Config, Counters, Failure, Inbox, Level, Log, Offer, Remote, Stage};

/// How often to try again to stream from a node that exists but has stopped streaming.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How often, and after what time, to ask again for a link that was refused. A session manager gets
/// to know of a new node when we do, and refuses to link to one that it has not looked at yet.
const LINK_TRIES: u32 = 4;
const LINK_AGAIN_AFTER: Duration = Duration::from_millis(150);

/// How long the daemon may take in all for its last answers, after which the thread ends without.
const GOODBYE_LIMIT: Duration = Duration::from_millis(500);

/// What the loop thread is told.
pub enum Command {
    /// Give the producer the buffers back that have returned: it may need them.
    TakeBack,
    /// Offer this to the producer from now on.
    Offer(Offer),
    /// End.
    Quit,
}

/// What joins the loop thread to the rest.
pub(super) struct Link {
    pub inbox: Arc<Inbox>,
    pub counters: Arc<Counters>,
    pub returns: Arc<Returns>,
    pub log: Log,
    /// Where explicit synchronization takes place.
    pub sync: Option<Arc<SyncNode>>,
    /// The number for the next buffer.
    pub next_buffer: Cell<u64>,
}

/// What the core's callbacks have core_notes.
#[derive(Default)]
struct CoreNotes {
    /// The last sync that the daemon has answered.
    done: Cell<Option<i32>>,
    /// The daemon knows explicit synchronization.
    knows_timelines: Cell<bool>,
    /// Why the connection is no more.
    lost: RefCell<Option<String>>,
}

/// What is known of a missing producer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// It was not there yet.
    Absent,
    /// It was there.
    Vanished,
}

/// What is wrong with a stream.
#[derive(Debug)]
enum Trouble {
    /// PipeWire says so.
    Error(String),
    /// The producer fixes no format.
    Unanswered,
    /// It was unlinked, or its buffers are gone.
    Gone,
}

/// Why the thread ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It was told to.
    Quit,
    /// The connection is no more.
    Lost,
}

/// What outlives a connection.
#[derive(Default)]
struct Past {
    /// The node that the stream is, or was last, connected to.
    node: Option<(u32, Node)>,
    /// What the consumer was told of a missing producer, until a format comes.
    told: Option<Told>,
    offer: Option<Offer>,
    /// Whether that node lacks buffers; see [`CaptureStream::has_lost`].
    lost: bool,
}

struct Worker {
    config: Rc<Config>,
    link: Rc<Link>,
    commands: Rc<RefCell<VecDeque<Command>>>,
    notes: Rc<CoreNotes>,
    nodes: NodeList,
    /// The sync after which the registry is complete.
    first_sync: i32,
    listed: bool,
    past: Past,
    stream: Option<CaptureStream>,
    retry_at: Option<Instant>,
    /// Links that were refused since the last format.
    refusals: u32,
    end: Option<End>,
    /// Somebody else has the connection's socket open as well.
    shared_socket: bool,
    _core_listener: Listener,
    // Behind everything that was made by it.
    core: CoreRc,
    /// What moves frames, where that is not the main loop.
    data_loop: Option<DataLoop>,
    looped: LoopRc,
}

/// Runs until told to quit, or until the connection is lost.
pub(super) fn run(config: Config, link: Link, receiver: Receiver<Command>) {
    pipewire::init();
    let link = Rc::new(link);
    let looped = match LoopRc::new(None) {
        Ok(looped) => looped,
        Err(error) => {
            let text = format!("setting up a PipeWire loop failed: {error}");
            link.inbox.put_failed(Failure::Connect(text));
            return link.inbox.tell();
        }
    };
    let commands = Rc::new(RefCell::new(VecDeque::new()));
    let _receiver = receiver.attach(&looped, {
        let commands = commands.clone();
        move |command| commands.borrow_mut().push_back(command)
    });

    // The loop stays entered throughout. Between turns of a loop that is not entered, any thread of
    // PipeWire's would run our callbacks itself instead of handing them to this one.
    // SAFETY: Paired with the leave below, on the same thread.
    unsafe { looped.enter() };
    stay_connected(config, &looped, &link, &commands);
    // SAFETY: Paired with the enter above. The worker and its stream are gone by now.
    unsafe { looped.leave() };
    link.inbox.tell();
}

/// Runs one worker after another, each with a connection of its own, until told to quit or until
/// there is no way back to the daemon.
fn stay_connected(
    mut config: Config,
    looped: &LoopRc,
    link: &Rc<Link>,
    commands: &Rc<RefCell<VecDeque<Command>>>,
) {
    let mut remote = std::mem::replace(&mut config.remote, Remote::Default);
    let mut past = Past::default();
    let config = Rc::new(config);
    loop {
        let once = matches!(remote, Remote::Socket(_));
        let remote = std::mem::replace(&mut remote, Remote::Default);
        match Worker::connect(
            config.clone(),
            remote,
            looped,
            link.clone(),
            commands.clone(),
        ) {
            Ok(mut worker) => {
                worker.past = past;
                let mut timeout = worker.timeout();
                while worker.end.is_none() {
                    if worker.turn(timeout) {
                        worker.after_turn();
                        timeout = worker.timeout();
                    }
                }
                let end = worker.end;
                past = worker.say_goodbye();
                if once || end == Some(End::Quit) {
                    return;
                }
            }
            // It has been there: it is being restarted, or is not, and `on-disconnect` has decided.
            Err(failure) if past.told == Some(Told::Vanished) => {
                (link.log)(Level::Debug, format_args!("{failure}"));
            }
            Err(failure) => return link.inbox.put_failed(failure),
        }
        link.inbox.tell();
        if !past.wait(looped, commands) {
            return;
        }
    }
}

impl Past {
    /// Waits until it is time to try again. False when told to quit instead.
    fn wait(&mut self, looped: &LoopRc, commands: &RefCell<VecDeque<Command>>) -> bool {
        let end = Instant::now() + RETRY_AFTER;
        loop {
            while let Some(command) = commands.borrow_mut().pop_front() {
                match command {
                    Command::Offer(offer) => self.offer = Some(offer),
                    // They are no more.
                    Command::TakeBack => {}
                    Command::Quit => return false,
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let left = Timeout::Finite(left + Duration::from_millis(1));
            // SAFETY: Entered by `run`, and left after this.
            unsafe { looped.iterate_unguarded(left) };
        }
    }
}

impl Worker {
    fn connect(
        config: Rc<Config>,
        remote: Remote,
        looped: &LoopRc,
        link: Rc<Link>,
        commands: Rc<RefCell<VecDeque<Command>>>,
    ) -> Result<Self, Failure> {
        let cannot = |what: &str, error: &dyn std::fmt::Display| {
            Failure::Connect(format!("{what} failed: {error}"))
        };
        let (key, value) = data_loop::NONE;
        let context = ContextRc::new(looped, Some(properties! { key => value }))
            .map_err(|error| cannot("setting up a PipeWire context", &error))?;
        // SAFETY: `run` has entered the main loop, and leaves it when the worker is gone.
        let data_loop = unsafe { DataLoop::take_over(&context, looped) }
            .map_err(|error| cannot("taking over PipeWire's data loop", &error))?;
        let shared_socket = matches!(remote, Remote::Socket(_));
        let name = properties! { *pipewire::keys::APP_NAME => config.name.as_str() };
        let core = match remote {
            Remote::Default => context.connect_rc(Some(name)).map_err(|_| {
                // libpipewire says why in errno, which nothing has touched since.
                let error = io::Error::last_os_error();
                Failure::Connect(format!(
                    "connect to PipeWire at {}: {error} (is the daemon running, and does \
                     XDG_RUNTIME_DIR or PIPEWIRE_REMOTE lead to it?)",
                    socket_name()
                ))
            })?,
            Remote::Socket(fd) => context.connect_fd_rc(fd, Some(name)).map_err(|_| {
                let error = io::Error::last_os_error();
                Failure::Connect(format!("connect to PipeWire on the given socket: {error}"))
            })?,
        };

        let core_notes = Rc::new(CoreNotes::default());
        let core_listener = core
            .add_listener_local()
            .info({
                let notes = core_notes.clone();
                move |info| {
                    let known = timeline::is_known_to(info.version());
                    notes.knows_timelines.set(known);
                }
            })
            .done({
                let notes = core_notes.clone();
                move |id, seq| {
                    if id == pipewire::core::PW_ID_CORE {
                        notes.done.set(Some(seq.seq()));
                    }
                }
            })
            .error({
                let (notes, log) = (core_notes.clone(), link.log.clone());
                move |id, _seq, result, message| {
                    let error = io::Error::from_raw_os_error(result.saturating_neg());
                    log(
                        Level::Debug,
                        format_args!("PipeWire object {id}: {message} ({error})"),
                    );
                    // Errors of other objects concern a proxy; the stream reports its own.
                    if id == pipewire::core::PW_ID_CORE && result == -libc::EPIPE {
                        notes.lost.borrow_mut().get_or_insert(message.to_owned());
                    }
                }
            })
            .register();
        let nodes = core
            .get_registry_rc()
            .map(NodeList::new)
            .map_err(|error| cannot("asking PipeWire for its registry", &error))?;
        let first_sync = core
            .sync(0)
            .map_err(|error| cannot("asking PipeWire for its nodes", &error))?
            .seq();
        link.inbox.put_connected();
        Ok(Self {
            config,
            link,
            commands,
            notes: core_notes,
            nodes,
            first_sync,
            listed: false,
            past: Past::default(),
            stream: None,
            retry_at: None,
            refusals: 0,
            end: None,
            shared_socket,
            _core_listener: core_listener,
            core,
            data_loop,
            looped: looped.clone(),
        })
    }

    fn log(&self, level: Level, message: std::fmt::Arguments<'_>) {
        (self.link.log)(level, message);
    }

    /// How long the loop may wait for events; none where it may for ever.
    fn timeout(&self) -> Option<Duration> {
        let stream = self.stream.as_ref();
        let moments = [stream.and_then(|s| s.waits().next()), self.retry_at];
        match moments.into_iter().flatten().min() {
            // Rounded up to the loop's milliseconds, so that it does not spin to the moment.
            Some(moment) => {
                Some(moment.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
            }
            None if self.commands.borrow().is_empty() => None,
            None => Some(Duration::ZERO),
        }
    }

    /// Waits for something to do, and lets PipeWire do it. False where that can only have been a
    /// frame, of which there is nothing to note: a frame comes when the compositor has filled the
    /// caches, and looking at all the notes for nothing would be a good part of what it costs.
    fn turn(&self, timeout: Option<Duration>) -> bool {
        self.link.inbox.tell();
        let wait = timeout.map_or(Timeout::Infinite, Timeout::Finite);
        if let Some(data_loop) = &self.data_loop {
            return data_loop.iterate(wait) || timeout.is_some();
        }
        // SAFETY: `run` has entered the loop, and leaves it after this.
        unsafe { self.looped.iterate_unguarded(wait) };
        true
    }

    /// Acts on what the callbacks of one turn of the loop have core_notes.
    fn after_turn(&mut self) {
        self.obey();
        let lost = self.notes.lost.borrow_mut().take();
        if let Some(reason) = lost {
            // Nothing can be given back any more.
            self.stream = None;
            self.vanish(
                format!("the PipeWire daemon has gone away ({reason})"),
                None,
            );
            if self.shared_socket {
                let text = "the PipeWire daemon has gone away, and the socket that was given leads \
                            to it no more: start again with a new one";
                self.link.inbox.put_failed(Failure::Daemon(text.into()));
            }
            self.end = Some(End::Lost);
        }
        if self.end.is_some() {
            return;
        }
        let (added, removed) = self.nodes.changes();
        let gone = self.see_removal(&removed);
        self.see_trouble();
        if !self.listed && self.notes.done.get() == Some(self.first_sync) {
            self.listed = true;
        } else if !(self.listed && (added || gone || self.retry_due())) {
            return;
        }
        self.find_target();
    }

    /// Gives the producer the buffers back that have returned.
    fn give_back(&self) {
        if let Some(stream) = &self.stream {
            stream.take_back();
        }
        // Without a stream they are no more.
        while self.link.returns.next().is_some() {
            self.link.inbox.put_returned();
        }
    }

    fn obey(&mut self) {
        loop {
            // In a statement of its own: the borrow must end before the command runs.
            let Some(command) = self.commands.borrow_mut().pop_front() else {
                return;
            };
            match command {
                Command::TakeBack => self.give_back(),
                Command::Offer(offer) => self.set_offer(offer),
                Command::Quit => self.end = Some(End::Quit),
            }
        }
    }

    fn set_offer(&mut self, offer: Offer) {
        self.log(Level::Debug, format_args!("offering {offer}"));
        if let Some(stream) = &self.stream
            && let Err(error) = stream.renegotiate(&offer)
        {
            self.log(
                Level::Warning,
                format_args!("changing the offered formats failed: {error}"),
            );
        }
        self.past.offer = Some(offer);
        if self.stream.is_none() && self.listed {
            self.find_target();
        }
    }

    /// The target's node has left the registry: that is certain, and at once (L2). True where it has:
    /// its successor may have come before, in a restart that overlaps.
    fn see_removal(&mut self, removed: &[u32]) -> bool {
        let Some((id, node)) = self
            .past
            .node
            .as_ref()
            .filter(|(id, _)| removed.contains(id))
        else {
            return false;
        };
        let reason = format!("{} has been removed", node.describe(*id));
        self.vanish(reason, None);
        // Another one has buffers of its own.
        self.past.lost = false;
        true
    }

    /// The stream reports an error, has no format, or its buffers have been gone for too long.
    fn see_trouble(&mut self) {
        let Some(stream) = &self.stream else {
            return;
        };
        if stream.had_format() {
            self.past.told = None;
            self.refusals = 0;
        }
        if !stream.had_format() && self.nodes.had_link_to(stream.node_id()) {
            stream.see_link();
        }
        if is_due(stream.waits().frame_due()) {
            self.log(Level::Debug, format_args!("asking for a frame"));
            if let Err(error) = stream.ask_for_frame() {
                self.log(Level::Warning, format_args!("pausing failed: {error}"));
            }
        }
        if is_due(stream.waits().choice_due()) {
            self.log(Level::Debug, format_args!("choosing a modifier"));
            if let Err(error) = stream.choose_modifier() {
                self.log(Level::Warning, format_args!("choosing failed: {error}"));
            }
        }
        if stream.needs_buffers() {
            self.log(Level::Debug, format_args!("asking for new buffers"));
            if let Err(error) = stream.renew_buffers() {
                self.log(
                    Level::Warning,
                    format_args!("offering again failed: {error}"),
                );
            }
        }
        if is_due(stream.waits().doubt_due()) {
            self.log(Level::Debug, format_args!("is the daemon alive?"));
            // Fails only when the connection is no more, which is noticed.
            if let Ok(sync) = self.core.sync(0) {
                stream.waits().doubted(sync.seq());
            }
        }
        stream.waits().daemon_said(self.notes.done.get());
        let trouble = if let Some(error) = stream.take_error() {
            Trouble::Error(error)
        } else if is_due(stream.waits().answer_due()) {
            Trouble::Unanswered
        } else if is_due(stream.waits().gone_due()) {
            Trouble::Gone
        } else {
            return;
        };
        // Else it would be called again and again, to no effect.
        let unanswered = stream.waits().is_answer_pending();
        let known = stream.had_format() || self.past.told == Some(Told::Vanished);
        let target = self.describe_target();
        if known && !unanswered {
            let reason = match trouble {
                Trouble::Error(reason) => format!("the stream from {target} broke off: {reason}"),
                Trouble::Gone | Trouble::Unanswered => {
                    format!("{target} has stopped streaming and taken its buffers away")
                }
            };
            self.vanish(reason, Some(Instant::now() + RETRY_AFTER));
            return;
        }
        self.refusals += 1;
        if let Trouble::Error(reason) = &trouble
            && self.refusals < LINK_TRIES
        {
            self.log(Level::Debug, format_args!("{target}: {reason}; once more"));
            self.end_stream();
            self.retry_at = Some(Instant::now() + LINK_AGAIN_AFTER);
            return;
        }
        let takes = self.past.offer.as_ref().map(Offer::to_string);
        let takes = takes.unwrap_or_default();
        let reason = match trouble {
            Trouble::Error(reason) => reason,
            Trouble::Unanswered => "it has fixed none".into(),
            Trouble::Gone => "the session manager has not linked the two".into(),
        };
        self.end_stream();
        self.link
            .inbox
            .put_failed(Failure::Stream(if unanswered {
                format!(
                    "{target} and what is downstream share no format: {reason}; what is downstream \
                     takes {takes} (pw-dump shows what the producer has; videoconvert and videoscale \
                     take more, and so may another output-mode)"
                )
            } else {
                format!(
                    "streaming from {target} failed: {reason} (what is downstream takes {takes})"
                )
            }));
    }

    fn describe_target(&self) -> String {
        let node = self.past.node.as_ref();
        node.map_or_else(|| self.config.target.to_string(), |(id, n)| n.describe(*id))
    }

    fn vanish(&mut self, reason: String, retry_at: Option<Instant>) {
        self.log(Level::Info, format_args!("{reason}"));
        self.end_stream();
        self.retry_at = retry_at;
        self.link.counters.set_stage(Stage::Absent);
        if self.past.told.replace(Told::Vanished) != Some(Told::Vanished) {
            self.link.inbox.put_vanished(reason);
        }
    }

    /// Ends the stream, if there is one; its producer gets all buffers back.
    fn end_stream(&mut self) {
        if let Some(stream) = self.stream.take() {
            stream.reclaim();
            self.past.lost = stream.has_lost();
        }
    }

    fn retry_due(&self) -> bool {
        is_due(self.retry_at)
    }

    /// Connects a stream to the target, if it is there and none is.
    fn find_target(&mut self) {
        if self.stream.is_some() || (self.retry_at.is_some() && !self.retry_due()) {
            return;
        }
        let known_as = self.past.node.as_ref().map(|(_, node)| node);
        let Some((id, node)) = self.nodes.find(&self.config.target, known_as) else {
            self.retry_at = None;
            self.link.counters.set_stage(Stage::Absent);
            if self.past.told.is_none() && self.past.node.is_none() {
                self.past.told = Some(Told::Absent);
                self.link.inbox.put_absent(format!(
                    "{} does not exist (pw-cli ls Node lists what this client may see)",
                    self.config.target
                ));
            }
            return;
        };
        if !node.may_be_video() {
            self.link.inbox.put_failed(Failure::Target(format!(
                "{} is a {}, not a source of video",
                node.describe(id),
                node.class.as_deref().unwrap_or("thing")
            )));
            return;
        }
        let Some(offer) = &self.past.offer else {
            return;
        };
        self.retry_at = None;
        let connected = CaptureStream::connect(
            self.core.clone(),
            self.link.clone(),
            &self.config.name,
            (id, &node),
            offer,
            self.notes.knows_timelines.get(),
            std::mem::take(&mut self.past.lost),
        );
        let what = node.describe(id);
        match connected {
            Ok(stream) => {
                self.log(Level::Info, format_args!("connecting to {what}"));
                self.stream = Some(stream);
            }
            Err(error) => self.link.inbox.put_failed(Failure::Stream(format!(
                "setting up a stream from {what} failed: {error}"
            ))),
        }
        self.past.node = Some((id, node));
    }

    /// Ends what the daemon does for us. On a socket that somebody else keeps open, such as the
    /// portal's, the daemon does not notice that we have gone, and would go on streaming to us:
    /// there, wait until it has confirmed.
    fn say_goodbye(mut self) -> Past {
        if self.end == Some(End::Lost) {
            return self.past;
        }
        let deadline = Instant::now() + GOODBYE_LIMIT;
        if self.stream.is_some() {
            // libpipewire before 0.3.72 loses the descriptors in what comes for a stream that is no
            // more. Of one that was only just set up the daemon gets to know with the first of
            // these; with the second its descriptors are here.
            self.wait_for_daemon(deadline);
            self.wait_for_daemon(deadline);
        }
        self.give_back();
        self.end_stream();
        if self.shared_socket {
            self.wait_for_daemon(deadline);
        }
        self.past
    }

    /// Waits until the daemon has done all that it was asked for, and its answers are here. Past the
    /// deadline it is still asked.
    fn wait_for_daemon(&self, deadline: Instant) {
        let Ok(sync) = self.core.sync(0) else {
            return;
        };
        while self.notes.done.get() != Some(sync.seq()) && self.notes.lost.borrow().is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            self.turn(Some(left));
            if left.is_zero() {
                return;
            }
        }
    }
}

/// The daemon's socket as libpipewire finds it (`pipewire(1)`, "ENVIRONMENT VARIABLES").
fn socket_name() -> String {
    let get = |key: &str| std::env::var_os(key).filter(|value| !value.is_empty());
    let remote = get("PIPEWIRE_REMOTE").unwrap_or_else(|| "pipewire-0".into());
    let folder = ["PIPEWIRE_RUNTIME_DIR", "XDG_RUNTIME_DIR", "USERPROFILE"]
        .into_iter()
        .find_map(get);
    match folder {
        // Joining leaves an absolute remote as it is.
        Some(folder) => PathBuf::from(folder).join(remote).display().to_string(),
        None => format!(
            "{} (and neither PIPEWIRE_RUNTIME_DIR nor XDG_RUNTIME_DIR is set)",
            PathBuf::from(remote).display()
        ),
    }
}
