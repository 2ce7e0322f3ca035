// SPDX-License-Identifier: MIT OR Apache-2.0

//! What QEMU calls: the listener of a console (`org.qemu.Display1.Listener` and its extensions in
//! QEMU's ui/dbus-display1.xml).
//!
//! Messages are handled one by one, in their order, and answered at once: QEMU waits for some of
//! the answers with the whole machine standing still. It waits for that to `UpdateDMABUF` with the
//! guest's GPU only, which is how a picture on the GPU stays whole while it is in use.

use std::collections::HashMap;
use std::future::poll_fn;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_core::Stream;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use zbus::message::{Flags, Type};
use zbus::{Connection, Fd, Message, MessageStream, Variant};

use crate::cursor::CursorShape;
use crate::dmabuf::{DmaBuf, LINEAR, Plane, known_modifier};
use crate::error::Error;
use crate::format::PixelFormat;
use crate::memory::Canvas;
use crate::picture::Layout;
use crate::screen::Screen;

const LISTENER: &str = "org.qemu.Display1.Listener";
const MAP: &str = "org.qemu.Display1.Listener.Unix.Map";
const DMABUF2: &str = "org.qemu.Display1.Listener.Unix.ScanoutDMABUF2";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const UNKNOWN: &str = "org.freedesktop.DBus.Error.UnknownMethod";

/// How long the guest's GPU may be held. QEMU gives up after 1 s (DBUS_DEFAULT_TIMEOUT in its
/// ui/dbus.h) and complains.
const HOLD_LIMIT: Duration = Duration::from_millis(500);

/// Calls of a listener that may be without an answer: one that the guest's GPU is held with, and one
/// whose answer is on its way. A QEMU that is held sends no more of them.
const MOST_HELD: usize = 2;

/// The most planes of a DMA-BUF (`QemuDmaBuf`; DRM has four as well).
const MOST_PLANES: usize = 4;

/// What a call is answered with.
enum Answer {
    Nothing,
    Interfaces(Vec<&'static str>),
    AllProperties(HashMap<&'static str, Variant<'static>>),
    /// Nothing, when the receiver is told or closed.
    Later(u64, oneshot::Receiver<()>),
    Unknown,
}

/// Puts into `screen` what QEMU says, until the connection ends. Returns why it did.
pub async fn serve(messages: &mut MessageStream, screen: &Arc<Screen>, address: &str) -> Error {
    let connection = Connection::from(&*messages);
    let held = Arc::new(Semaphore::new(MOST_HELD));
    loop {
        let message = match poll_fn(|context| Pin::new(&mut *messages).poll_next(context)).await {
            Some(Ok(message)) => message,
            Some(Err(error)) => return gone(address, &error.to_string()),
            None => return gone(address, "it closed the connection"),
        };
        if message.message_type() != Type::MethodCall {
            continue;
        }
        let answer = match handle(screen, &message) {
            Ok(answer) => answer,
            Err(error) => return error,
        };
        if let Err(error) = reply(&connection, &message, answer, screen, &held).await {
            return gone(address, &error.to_string());
        }
    }
}

fn gone(address: &str, reason: &str) -> Error {
    Error::Gone {
        address: address.to_owned(),
        reason: reason.to_owned(),
    }
}

async fn reply(
    connection: &Connection,
    message: &Message,
    answer: Answer,
    screen: &Arc<Screen>,
    held: &Arc<Semaphore>,
) -> zbus::Result<()> {
    let header = message.header();
    if header.primary().flags().contains(Flags::NO_REPLY_EXPECTED) {
        return Ok(());
    }
    match answer {
        Answer::Nothing => connection.reply(&header, &()).await,
        Answer::Interfaces(names) => connection.reply(&header, &Variant::from(names)).await,
        Answer::AllProperties(properties) => connection.reply(&header, &properties).await,
        Answer::Unknown => {
            let text = "no such method here";
            connection.reply_error(&header, UNKNOWN, &text).await
        }
        Answer::Later(number, mut receiver) => {
            let Some(place) = place(held, &mut receiver) else {
                return connection.reply(&header, &()).await;
            };
            let (connection, message) = (connection.clone(), message.clone());
            let screen = screen.clone();
            // Ends with the runtime, that is with the connection.
            tokio::spawn(async move {
                if tokio::time::timeout(HOLD_LIMIT, receiver).await.is_err() {
                    screen.waited(number);
                }
                // Who cannot be answered has gone, which `serve` notices.
                let _ = connection.reply(&message.header(), &()).await;
                drop(place);
            });
            Ok(())
        }
    }
}

/// A place for a call that is answered when `receiver` is closed. None if it is, or there are too many
/// already: each keeps its message.
fn place(
    held: &Arc<Semaphore>,
    receiver: &mut oneshot::Receiver<()>,
) -> Option<OwnedSemaphorePermit> {
    if receiver.try_recv() != Err(TryRecvError::Empty) {
        return None;
    }
    held.clone().try_acquire_owned().ok()
}

/// Reads the arguments of a call.
macro_rules! arguments {
    ($message:expr, $body:ident, $kind:ty) => {{
        $body = $message.body();
        $body.deserialize::<$kind>().map_err(|error| {
            let member = $message.header().member().map(ToString::to_string);
            Error::Nonsense(format!(
                "a call of {} with strange arguments: {error}",
                member.unwrap_or_default()
            ))
        })?
    }};
}

fn handle(screen: &Screen, message: &Message) -> Result<Answer, Error> {
    type At = (i32, i32, i32, i32);
    let header = message.header();
    let interface = header.interface().map_or("", |name| name.as_str());
    let member = header.member().map_or("", |name| name.as_str());
    let body;
    match (interface, member) {
        (LISTENER, "Scanout") => {
            let (width, height, stride, format, data) =
                arguments!(message, body, (u32, u32, u32, u32, &[u8]));
            let layout = Layout::checked(width, height, stride, format)?;
            let canvas = Canvas::in_message(message, data)
                .ok_or_else(|| Error::System("a message that moved".to_owned()))?;
            screen.scanout(layout, canvas)?;
        }
        (LISTENER, "Update") => {
            let (x, y, width, height, stride, format, data) =
                arguments!(message, body, (i32, i32, i32, i32, u32, u32, &[u8]));
            let size = u32::try_from(width).ok().zip(u32::try_from(height).ok());
            let (width, height) = size.unwrap_or_default();
            let layout = Layout::checked(width, height, stride, format)?;
            screen.update((x, y), layout, data)?;
        }
        (MAP, "ScanoutMap") => {
            let (fd, offset, width, height, stride, format) =
                arguments!(message, body, (Fd<'_>, u32, u32, u32, u32, u32));
            let layout = Layout::checked(width, height, stride, format)?;
            screen.scanout_map(duplicate(&fd)?, offset, layout)?;
        }
        (MAP, "UpdateMap") => {
            let (x, y, width, height) = arguments!(message, body, At);
            screen.update_map((x, y), (width, height));
        }
        (LISTENER, "ScanoutDMABUF") => {
            let (fd, width, height, stride, fourcc, modifier, y0_top) =
                arguments!(message, body, (Fd<'_>, u32, u32, u32, u32, u64, bool));
            let planes = vec![Plane::checked(duplicate(&fd)?, 0, stride)?];
            let (size, modifier) = ((width, height), known_modifier(modifier, &planes));
            screen.scanout_dmabuf(DmaBuf::checked(size, fourcc, modifier, planes, y0_top)?);
        }
        (DMABUF2, "ScanoutDMABUF2") => screen.scanout_dmabuf(dmabuf2(message)?),
        (LISTENER, "UpdateDMABUF") => {
            let (x, y, width, height) = arguments!(message, body, At);
            let (number, receiver) = screen.update_dmabuf((x, y), (width, height));
            return Ok(Answer::Later(number, receiver));
        }
        (LISTENER, "Disable") => screen.disable(),
        (LISTENER, "MouseSet") => {
            let (x, y, on) = arguments!(message, body, (i32, i32, i32));
            screen.mouse_set(x, y, on != 0);
        }
        (LISTENER, "CursorDefine") => {
            let (width, height, _hot_x, _hot_y, data) =
                arguments!(message, body, (i32, i32, i32, i32, &[u8]));
            screen.cursor_define(CursorShape::checked(width, height, data)?);
        }
        (PROPERTIES, "Get") => return Ok(Answer::Interfaces(vec![MAP, DMABUF2])),
        (PROPERTIES, "GetAll") => {
            let of: &str = arguments!(message, body, &str);
            let mut properties = HashMap::new();
            if of == LISTENER {
                properties.insert("Interfaces", Variant::from(vec![MAP, DMABUF2]));
            }
            return Ok(Answer::AllProperties(properties));
        }
        _ => return Ok(Answer::Unknown),
    }
    Ok(Answer::Nothing)
}

/// The picture of a `ScanoutDMABUF2` call.
fn dmabuf2(message: &Message) -> Result<DmaBuf, Error> {
    let body;
    let (
        fds,
        x,
        y,
        width,
        height,
        offsets,
        strides,
        planes,
        fourcc,
        _backing_width,
        backing_height,
        modifier,
        y0_top,
    ) = arguments!(
        message,
        body,
        (
            Vec<Fd<'_>>,
            u32,
            u32,
            u32,
            u32,
            Vec<u32>,
            Vec<u32>,
            u32,
            u32,
            u32,
            u32,
            u64,
            bool
        )
    );
    let count = planes as usize;
    let lengths = [fds.len(), offsets.len(), strides.len()];
    if !(1..=MOST_PLANES).contains(&count) || lengths.iter().any(|length| *length < count) {
        return Err(Error::Nonsense(format!(
            "a DMA-BUF picture of {count} planes with {lengths:?} buffers, offsets and strides"
        )));
    }
    let planes = fds.iter().zip(offsets).zip(strides).take(count);
    let mut planes = planes
        .map(|((fd, offset), stride)| Plane::checked(duplicate(fd)?, offset, stride))
        .collect::<Result<Vec<_>, _>>()?;
    let modifier = known_modifier(modifier, &planes);
    let y = first_row((y, height), backing_height, y0_top);
    if (x, y) != (0, 0) {
        move_to(&mut planes, (x, y), fourcc, modifier)?;
    }
    DmaBuf::checked((width, height), fourcc, modifier, planes, y0_top)
}

/// The row of the buffer that a picture of so many rows from `y` on begins with. The guest counts them
/// from the top, which is where a buffer ends that has its last row first.
fn first_row((y, height): (u32, u32), backing_height: u32, y0_top: bool) -> u32 {
    if y0_top {
        backing_height.saturating_sub(y.saturating_add(height))
    } else {
        y
    }
}

/// Has the picture begin at a place in a larger one, as that of the second output does where a guest
/// has one framebuffer for both.
fn move_to(
    planes: &mut [Plane],
    (x, y): (u32, u32),
    fourcc: u32,
    modifier: u64,
) -> Result<(), Error> {
    let format = PixelFormat::from_fourcc(fourcc).filter(|_| modifier == LINEAR);
    let ([plane], Some(format)) = (planes, format) else {
        return Err(Error::System(format!(
            "a picture on a GPU that begins at {x},{y} of a larger one, in memory that is not \
             linear (modifier {modifier:#x}); that is not supported"
        )));
    };
    let bytes = u64::from(y) * u64::from(plane.stride)
        + u64::from(x) * format.bytes_per_pixel() as u64
        + u64::from(plane.offset);
    plane.offset = u32::try_from(bytes)
        .ok()
        .filter(|offset| u64::from(*offset) < plane.size)
        .ok_or_else(|| {
            Error::Nonsense(format!(
                "a DMA-BUF of {} bytes with a picture at {bytes}",
                plane.size
            ))
        })?;
    Ok(())
}

/// A descriptor of our own; the message's is closed with it.
fn duplicate(fd: &Fd<'_>) -> Result<OwnedFd, Error> {
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|error| Error::System(format!("no descriptor for a picture: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_without_an_answer_are_few() {
        let held = Arc::new(Semaphore::new(MOST_HELD));
        let (senders, mut receivers): (Vec<_>, Vec<_>) =
            (0..=MOST_HELD).map(|_| oneshot::channel()).unzip();
        let places: Vec<_> = receivers
            .iter_mut()
            .map(|receiver| place(&held, receiver))
            .collect();
        assert!(places[..MOST_HELD].iter().all(Option::is_some));
        assert!(places[MOST_HELD].is_none(), "one too many");
        drop(places);
        assert!(place(&held, &mut receivers[0]).is_some(), "some are over");
        drop(senders);
        assert!(
            place(&held, &mut receivers[0]).is_none(),
            "it need not wait"
        );
    }

    #[test]
    fn rows_are_counted_from_the_end_of_a_buffer_with_its_last_row_first() {
        assert_eq!(first_row((0, 768), 768, false), 0);
        assert_eq!(first_row((0, 600), 768, false), 0);
        assert_eq!(first_row((168, 600), 768, false), 168);
        assert_eq!(first_row((0, 768), 768, true), 0);
        assert_eq!(first_row((0, 600), 768, true), 168);
        assert_eq!(first_row((168, 600), 768, true), 0);
        assert_eq!(first_row((68, 600), 768, true), 100);
        assert_eq!(first_row((u32::MAX, 600), 768, true), 0);
    }
}
