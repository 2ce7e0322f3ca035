// SPDX-License-Identifier: MIT OR Apache-2.0

//! The latest picture of one console.
//!
//! The connection's thread puts in what QEMU says, as fast as it comes; whoever shows the screen
//! takes a picture when it is time for one. Between two takings changes pile up as [`Damage`] and
//! never as pictures.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use crate::cursor::{Cursor, CursorShape};
use crate::damage::{Damage, Rect};
use crate::dmabuf::DmaBuf;
use crate::error::Error;
use crate::memory::{Canvas, Lease, Leases, SharedFile, Spares};
use crate::picture::{Layout, Picture, Pixels};

/// For how long after QEMU has drawn into memory that was lent, more of that is expected.
const BUSY: Duration = Duration::from_secs(1);

/// What there is to be done about a screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// There is no picture yet.
    Empty,
    /// A picture, taken before, and nothing new.
    Still,
    /// The cursor has changed, and nothing else.
    Cursor,
    /// A new picture, or a changed one.
    News,
    /// QEMU has switched the screen off; there is no picture until it is on again.
    Off,
    /// It has ended. Nothing will come any more.
    Failed(Error),
}

/// What has happened to a screen, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Pictures and changes of them that QEMU has sent.
    pub updates: u64,
    /// Those that came before the one before them was taken.
    pub coalesced: u64,
    /// Changes of something that is not in the picture; ignored.
    pub ignored: u64,
    /// Pictures copied because QEMU changed them while they were in use.
    pub copies: u64,
    /// Times that QEMU drew into shared memory while it was in use.
    pub overlaps: u64,
    /// Bytes of pixels in messages.
    pub bytes: u64,
}

#[derive(Debug)]
enum Content {
    Bytes(Layout, Arc<Canvas>),
    Shared(Layout, Arc<SharedFile>, u64),
    DmaBuf(Arc<DmaBuf>),
}

impl Content {
    fn size(&self) -> (u32, u32) {
        match self {
            Self::Bytes(layout, _) | Self::Shared(layout, ..) => (layout.width, layout.height),
            Self::DmaBuf(buffer) => (buffer.width, buffer.height),
        }
    }
}

#[expect(
    clippy::struct_excessive_bools,
    reason = "each says one thing, and all combinations occur"
)]
struct State {
    content: Option<Content>,
    /// Whole ones so far.
    pictures: u64,
    damage: Damage,
    news: bool,
    cursor: Cursor,
    cursor_news: bool,
    off: bool,
    failure: Option<Error>,
    arrived: Instant,
    /// Dropped or given away with a lease, it lets QEMU go on. With the number of the change that it
    /// answers.
    reply: Option<(u64, oneshot::Sender<()>)>,
    /// Changes so far that QEMU wanted to wait with.
    waits: u64,
    /// A picture in DMA-BUFs has taken the place of another one, and nothing has happened since.
    replaced: bool,
    /// QEMU has waited in vain, and is not made to do that again before a picture is taken.
    unattended: bool,
    leases: Leases,
    drawn_while_lent: Option<Instant>,
    figures: Figures,
    spares: Spares,
}

impl State {
    /// Another picture takes the place of the one that there is, which is returned. Nothing is left of
    /// what QEMU wanted with that one.
    fn show(&mut self, content: Option<Content>) -> Option<Content> {
        self.reply = None;
        self.replaced = false;
        self.pictures += u64::from(content.is_some());
        std::mem::replace(&mut self.content, content)
    }

    /// What of the picture lies in a rectangle as QEMU says it, of what was drawn into memory that it shares.
    /// Right after a picture became smaller, QEMU with `gl=on` still says how large it was (QEMU 10; it tells
    /// all that was drawn at once, what was drawn since included).
    fn part(&self, at: (i32, i32), (width, height): (i32, i32)) -> Option<Rect> {
        let extent = (u32::try_from(width).ok()?, u32::try_from(height).ok()?);
        Rect::clipped(at, extent, self.content.as_ref()?.size())
    }

    /// There is no picture any more.
    fn clear(&mut self) {
        self.show(None);
        self.news = false;
    }
}

/// One console's screen.
pub struct Screen {
    console: u32,
    label: String,
    state: Mutex<State>,
    notify: Box<dyn Fn() + Send + Sync>,
    /// How many want to know what it shows.
    listeners: watch::Sender<usize>,
}

/// As long as somebody keeps one of these, QEMU says what the screen shows: it converts and sends
/// every change to a listener, and does nothing of that without one.
#[must_use = "nothing is heard of a screen once this is dropped"]
pub struct Listening(Arc<Screen>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.listeners.send_modify(|listeners| *listeners -= 1);
    }
}

impl Screen {
    /// A screen of which nothing is known. `notify` is called by the connection's thread when
    /// [`Screen::look`] may say something new.
    pub(crate) fn new(
        console: u32,
        label: String,
        notify: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self {
            console,
            label,
            notify: Box::new(notify),
            listeners: watch::Sender::new(0),
            state: Mutex::new(State {
                content: None,
                pictures: 0,
                damage: Damage::All,
                news: false,
                cursor: Cursor::default(),
                cursor_news: false,
                off: false,
                failure: None,
                arrived: Instant::now(),
                reply: None,
                waits: 0,
                replaced: false,
                unattended: false,
                leases: Leases::default(),
                drawn_while_lent: None,
                figures: Figures::default(),
                spares: Spares::default(),
            }),
        }
    }

    /// The console's number.
    pub fn console(&self) -> u32 {
        self.console
    }

    /// What QEMU calls the console.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Has QEMU say what the screen shows, beginning with a whole picture. Until that has come, and
    /// while nobody listens, the screen is [`Look::Empty`].
    pub fn listen(self: &Arc<Self>) -> Listening {
        self.listeners.send_modify(|listeners| *listeners += 1);
        Listening(self.clone())
    }

    /// How many listen, now and from now on.
    pub(crate) fn listeners(&self) -> watch::Receiver<usize> {
        self.listeners.subscribe()
    }

    /// What there is to be done.
    pub fn look(&self) -> Look {
        let state = self.lock();
        match (&state.failure, &state.content) {
            (Some(failure), _) => Look::Failed(failure.clone()),
            _ if state.off => Look::Off,
            (None, None) => Look::Empty,
            _ if state.news => Look::News,
            _ if state.cursor_news => Look::Cursor,
            _ => Look::Still,
        }
    }

    /// The picture now, new or not: whoever comes late to a still screen sees it too.
    ///
    /// An error says that QEMU has made its memory smaller than the picture in it.
    pub fn take(&self) -> Result<Option<Picture>, Error> {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(content) = state.content.as_ref().filter(|_| !state.off) else {
            return Ok(None);
        };
        let pixels = match content {
            Content::Bytes(layout, canvas) => Pixels::Bytes {
                layout: *layout,
                canvas: canvas.clone(),
            },
            Content::Shared(layout, file, offset) => {
                file.has(offset + layout.bytes() as u64)?;
                let lease = Lease::new(None);
                state.leases.add(&lease);
                Pixels::Shared {
                    layout: *layout,
                    file: file.clone(),
                    offset: *offset,
                    lease,
                    busy: state
                        .drawn_while_lent
                        .is_some_and(|moment| moment.elapsed() < BUSY),
                }
            }
            Content::DmaBuf(buffer) => Pixels::DmaBuf {
                buffer: buffer.clone(),
                lease: Lease::new(state.reply.take().map(|(_, reply)| reply)),
            },
        };
        state.news = false;
        state.unattended = false;
        Ok(Some(Picture {
            pixels,
            cursor_changed: std::mem::take(&mut state.cursor_news),
            damage: std::mem::replace(&mut state.damage, Damage::NONE),
            cursor: state.cursor.clone(),
            arrived: state.arrived,
        }))
    }

    /// What has happened so far.
    pub fn figures(&self) -> Figures {
        self.lock().figures
    }

    /// Width and height of the picture in pixels, if there is one.
    pub fn size(&self) -> Option<(u32, u32)> {
        self.lock().content.as_ref().map(Content::size)
    }

    /// How many whole pictures there were.
    pub(crate) fn pictures(&self) -> u64 {
        self.lock().pictures
    }

    /// The picture is that of another size, and what comes now changes one that is not here yet.
    pub(crate) fn forget(&self) {
        self.lock().clear();
    }

    /// Nobody listens any more: what is known grows old. The cursor is kept: QEMU before 8.0 tells a
    /// new listener none until it has another shape, and newer ones say it again.
    pub(crate) fn ignore(&self) {
        let mut state = self.lock();
        state.clear();
        state.unattended = false;
        state.off = false;
        state.cursor_news = false;
    }

    /// A whole picture in a message.
    pub(crate) fn scanout(&self, layout: Layout, canvas: Canvas) -> Result<(), Error> {
        let there = canvas.as_ref().len();
        if there < layout.bytes() {
            return Err(Error::Nonsense(format!(
                "{there} bytes for a picture of {}",
                layout.bytes()
            )));
        }
        let mut state = self.lock();
        state.figures.bytes += there as u64;
        state.show(Some(Content::Bytes(layout, Arc::new(canvas))));
        self.changed(state, None);
        Ok(())
    }

    /// Part of a picture in a message: `data` lies as `layout` says.
    pub(crate) fn update(&self, at: (i32, i32), layout: Layout, data: &[u8]) -> Result<(), Error> {
        // The last row may end with its pixels.
        let (row, stride) = (layout.row_bytes(), layout.stride as usize);
        let needed = stride * (layout.height as usize - 1) + row;
        if data.len() < needed {
            return Err(Error::Nonsense(format!(
                "{} bytes for a change of {needed}",
                data.len()
            )));
        }
        let mut guard = self.lock();
        let state = &mut *guard;
        state.figures.bytes += data.len() as u64;
        let extent = (layout.width as i32, layout.height as i32);
        let target = match &mut state.content {
            Some(Content::Bytes(whole, canvas)) if whole.format == layout.format => {
                Rect::checked(at, extent, (whole.width, whole.height))
                    .map(|rect| (rect, *whole, canvas))
            }
            _ => None,
        };
        // QEMU may change a new picture before it has sent it whole.
        let Some((rect, whole, canvas)) = target else {
            state.figures.ignored += 1;
            return Ok(());
        };
        if Arc::get_mut(canvas).is_none_or(|canvas| canvas.own_bytes().is_none()) {
            let used = &(**canvas).as_ref()[..whole.bytes()];
            *canvas = Arc::new(Canvas::copied(used, &state.spares));
            state.figures.copies += 1;
        }
        let bytes = Arc::get_mut(canvas).and_then(Canvas::own_bytes);
        let bytes = bytes.expect("it is a copy of ours now, and nobody else has it");
        let start = rect.y as usize * whole.stride as usize
            + rect.x as usize * whole.format.bytes_per_pixel();
        let rows = bytes[start..].chunks_mut(whole.stride as usize);
        for (to, from) in rows.zip(data.chunks(stride)).take(layout.height as usize) {
            to[..row].copy_from_slice(&from[..row]);
        }
        self.changed(guard, Some(rect));
        Ok(())
    }

    /// A picture in a memfd.
    pub(crate) fn scanout_map(
        &self,
        fd: OwnedFd,
        offset: u32,
        layout: Layout,
    ) -> Result<(), Error> {
        let offset = u64::from(offset);
        let file = SharedFile::checked(fd, offset + layout.bytes() as u64)?;
        let mut state = self.lock();
        state.show(Some(Content::Shared(layout, Arc::new(file), offset)));
        // The guest may draw into the memory before this one from now on.
        Self::drawn(&mut state);
        self.changed(state, None);
        Ok(())
    }

    /// QEMU has drawn into the memfd.
    pub(crate) fn update_map(&self, at: (i32, i32), extent: (i32, i32)) {
        let mut state = self.lock();
        Self::drawn(&mut state);
        let shared = matches!(state.content, Some(Content::Shared(..)));
        let rect = state.part(at, extent).filter(|_| shared);
        self.changed_part(state, rect);
    }

    /// A picture in DMA-BUFs.
    pub(crate) fn scanout_dmabuf(&self, buffer: DmaBuf) {
        let mut state = self.lock();
        let before = state.show(Some(Content::DmaBuf(Arc::new(buffer))));
        state.replaced = matches!(before, Some(Content::DmaBuf(_)));
        self.changed(state, None);
    }

    /// The guest has drawn into the DMA-BUFs and waits until what is returned is closed. With a number
    /// for [`Screen::waited`].
    pub(crate) fn update_dmabuf(
        &self,
        at: (i32, i32),
        extent: (i32, i32),
    ) -> (u64, oneshot::Receiver<()>) {
        let (reply, receiver) = oneshot::channel();
        let mut state = self.lock();
        state.replaced = false;
        let shown = matches!(state.content, Some(Content::DmaBuf(_)));
        let rect = state.part(at, extent).filter(|_| shown);
        // QEMU waits for the answers to all parts of a change: one of them is enough to hold it.
        state.waits += 1;
        let number = state.waits;
        if rect.is_some() && !state.unattended && state.reply.is_none() {
            state.reply = Some((number, reply));
        }
        self.changed_part(state, rect);
        (number, receiver)
    }

    /// QEMU has waited with this change for as long as it may. If nobody has taken the picture, nobody
    /// looks. Another change that it waits with is not meant.
    pub(crate) fn waited(&self, number: u64) {
        let mut state = self.lock();
        state.unattended |= state.reply.take_if(|(of, _)| *of == number).is_some();
    }

    /// The screen is switched off; or QEMU lets go of the DMA-BUF before this one, which it tells
    /// with the same call (`dbus_release_dmabuf` in its ui/dbus-listener.c).
    pub(crate) fn disable(&self) {
        let mut state = self.lock();
        if std::mem::take(&mut state.replaced) {
            return;
        }
        state.clear();
        let told = std::mem::replace(&mut state.off, true);
        drop(state);
        if !told {
            (self.notify)();
        }
    }

    /// The cursor has another shape.
    pub(crate) fn cursor_define(&self, shape: CursorShape) {
        let mut state = self.lock();
        state.cursor.shape = Some(Arc::new(shape));
        self.cursor_changed(state);
    }

    /// The cursor is elsewhere.
    pub(crate) fn mouse_set(&self, x: i32, y: i32, visible: bool) {
        let mut state = self.lock();
        let cursor = &mut state.cursor;
        if (cursor.x, cursor.y, cursor.visible) == (x, y, visible) {
            return;
        }
        (cursor.x, cursor.y, cursor.visible) = (x, y, visible);
        self.cursor_changed(state);
    }

    /// The end.
    pub(crate) fn fail(&self, error: Error) {
        let mut state = self.lock();
        state.clear();
        state.failure.get_or_insert(error);
        drop(state);
        (self.notify)();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drawn(state: &mut State) {
        if state.leases.any() {
            state.drawn_while_lent = Some(Instant::now());
            state.figures.overlaps += 1;
        }
    }

    /// A part of the picture has changed; or what is not in it, which changes nothing.
    fn changed_part(&self, mut state: MutexGuard<'_, State>, rect: Option<Rect>) {
        match rect {
            Some(rect) => self.changed(state, Some(rect)),
            None => state.figures.ignored += 1,
        }
    }

    /// All of the picture has changed, or a part.
    fn changed(&self, mut state: MutexGuard<'_, State>, part: Option<Rect>) {
        state.figures.updates += 1;
        state.arrived = Instant::now();
        state.off = false;
        match part {
            Some(rect) => state.damage.add(rect),
            None => state.damage = Damage::All,
        }
        let told = std::mem::replace(&mut state.news, true);
        if told {
            state.figures.coalesced += 1;
        }
        drop(state);
        // Hundreds of updates a second wake nobody more often than pictures are taken.
        if !told {
            (self.notify)();
        }
    }

    fn cursor_changed(&self, mut state: MutexGuard<'_, State>) {
        if !state.news && !state.cursor_news {
            state.arrived = Instant::now();
        }
        let told = std::mem::replace(&mut state.cursor_news, true);
        drop(state);
        if !told {
            (self.notify)();
        }
    }
}

#[cfg(test)]
mod tests;
