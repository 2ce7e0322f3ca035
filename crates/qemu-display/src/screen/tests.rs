// SPDX-License-Identifier: MIT OR Apache-2.0

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::sync::oneshot::error::TryRecvError;

use super::*;

const X8R8G8B8: u32 = 0x2002_0888;

fn screen() -> (Screen, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    let notify = move || {
        counter.fetch_add(1, Ordering::Relaxed);
    };
    (Screen::new(0, "VGA".to_owned(), notify), calls)
}

fn layout(width: u32, height: u32) -> Layout {
    Layout::checked(width, height, width * 4, X8R8G8B8).unwrap()
}

fn canvas(layout: Layout, value: u8) -> Canvas {
    Canvas::copied(&vec![value; layout.bytes()], &Spares::default())
}

fn bytes(picture: &Picture) -> Vec<u8> {
    match &picture.pixels {
        Pixels::Bytes { canvas, .. } => (**canvas).as_ref().to_vec(),
        other => panic!("{other:?}"),
    }
}

fn memfd(size: u64) -> OwnedFd {
    let file = File::from(memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file.into()
}

fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
    Rect {
        x,
        y,
        width,
        height,
    }
}

#[test]
fn a_picture_is_news_once_and_can_be_taken_again() {
    let (screen, calls) = screen();
    assert_eq!(screen.look(), Look::Empty);
    assert!(screen.take().unwrap().is_none());
    let layout = layout(8, 4);
    screen.scanout(layout, canvas(layout, 1)).unwrap();
    assert_eq!(screen.look(), Look::News);
    assert_eq!(screen.take().unwrap().unwrap().damage, Damage::All);
    assert_eq!(screen.look(), Look::Still);
    let again = screen.take().unwrap().unwrap();
    assert!(again.damage.is_none());
    assert_eq!(bytes(&again), vec![1; 8 * 4 * 4]);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

#[test]
fn an_update_changes_its_rectangle_and_nothing_else() {
    let (screen, _) = screen();
    let whole = layout(4, 3);
    screen.scanout(whole, canvas(whole, 0)).unwrap();
    screen.take().unwrap();
    // Two by two pixels, with four bytes of padding after each row but the last.
    let part = Layout::checked(2, 2, 12, X8R8G8B8).unwrap();
    screen.update((1, 1), part, &[7; 20]).unwrap();
    let picture = screen.take().unwrap().unwrap();
    assert_eq!(picture.damage, Damage::Rects(vec![rect(1, 1, 2, 2)]));
    let mut expected = vec![0; 4 * 3 * 4];
    for row in [1, 2] {
        expected[row * 16 + 4..row * 16 + 12].fill(7);
    }
    assert_eq!(bytes(&picture), expected);
}

#[test]
fn a_picture_in_use_is_copied_before_it_changes_and_only_then() {
    let (screen, _) = screen();
    let whole = layout(4, 1);
    screen.scanout(whole, canvas(whole, 0)).unwrap();
    let part = layout(1, 1);
    screen.update((0, 0), part, &[1; 4]).unwrap();
    assert_eq!(screen.figures().copies, 0);
    let used = screen.take().unwrap().unwrap();
    let before = bytes(&used);
    screen.update((1, 0), part, &[2; 4]).unwrap();
    screen.update((2, 0), part, &[3; 4]).unwrap();
    assert_eq!(screen.figures().copies, 1);
    assert_eq!(bytes(&used), before);
    let after = screen.take().unwrap().unwrap();
    assert_eq!(
        bytes(&after),
        [[1; 4], [2; 4], [3; 4], [0; 4]].concat(),
        "all of it"
    );
}

#[test]
fn updates_before_a_taking_are_one_with_all_their_damage() {
    let (screen, calls) = screen();
    let whole = layout(8, 8);
    screen.scanout(whole, canvas(whole, 0)).unwrap();
    screen.take().unwrap();
    for x in 0..3 {
        screen.update((x * 2, 0), layout(1, 1), &[9; 4]).unwrap();
    }
    let damage = screen.take().unwrap().unwrap().damage;
    let expected = (0..3).map(|x| rect(x * 2, 0, 1, 1)).collect();
    assert_eq!(damage, Damage::Rects(expected));
    let figures = screen.figures();
    assert_eq!((figures.updates, figures.coalesced), (4, 2));
    assert_eq!(calls.load(Ordering::Relaxed), 2);
}

#[test]
fn updates_outside_the_picture_are_ignored() {
    let (screen, calls) = screen();
    let part = layout(2, 2);
    screen.update((0, 0), part, &[1; 16]).unwrap();
    screen.update_map((0, 0), (1, 1));
    assert_eq!(screen.look(), Look::Empty);
    let whole = layout(4, 4);
    screen.scanout(whole, canvas(whole, 0)).unwrap();
    screen.take().unwrap();
    screen.update((3, 3), part, &[1; 16]).unwrap();
    screen.update((-1, 0), part, &[1; 16]).unwrap();
    let other = Layout::checked(2, 2, 8, 0x2003_0888).unwrap();
    screen.update((0, 0), other, &[1; 16]).unwrap();
    assert_eq!(screen.look(), Look::Still);
    assert_eq!(screen.figures().ignored, 5);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

/// QEMU 10 with `gl=on` and a guest that sets a smaller mode: the change that it tells is as large as the picture
/// before, and the only one that it tells of all that was drawn meanwhile.
#[test]
fn a_change_larger_than_the_picture_changes_all_of_it() {
    let (screen, calls) = screen();
    screen.scanout_map(memfd(64), 0, layout(4, 4)).unwrap();
    screen.take().unwrap();
    screen.update_map((0, 0), (8, 5));
    assert_eq!(screen.look(), Look::News);
    let damage = screen.take().unwrap().unwrap().damage;
    assert_eq!(damage, Damage::Rects(vec![rect(0, 0, 4, 4)]));
    for (at, extent) in [((4, 0), (8, 8)), ((0, 0), (-1, 4)), ((-2, 0), (2, 4))] {
        screen.update_map(at, extent);
    }
    assert_eq!(screen.look(), Look::Still, "beside it");
    assert_eq!(screen.figures().ignored, 3);
    assert_eq!(calls.load(Ordering::Relaxed), 2);
}

#[test]
fn too_few_bytes_are_nonsense() {
    let (screen, _) = screen();
    let whole = layout(4, 4);
    let short = Canvas::copied(&[0; 63], &Spares::default());
    assert!(screen.scanout(whole, short).is_err());
    screen.scanout(whole, canvas(whole, 0)).unwrap();
    assert!(screen.update((0, 0), layout(2, 2), &[0; 15]).is_err());
    assert!(screen.scanout_map(memfd(63), 0, whole).is_err());
    assert!(screen.scanout_map(memfd(64), 1, whole).is_err());
    assert!(screen.scanout_map(memfd(64), u32::MAX, whole).is_err());
    assert!(screen.scanout_map(memfd(65), 1, whole).is_ok());
}

#[test]
fn drawing_into_lent_memory_asks_for_copies() {
    let (screen, _) = screen();
    let whole = layout(4, 4);
    screen.scanout_map(memfd(64), 0, whole).unwrap();
    let busy = |picture: &Picture| match &picture.pixels {
        Pixels::Shared { busy, .. } => *busy,
        other => panic!("{other:?}"),
    };
    let first = screen.take().unwrap().unwrap();
    assert!(!busy(&first));
    drop(first);
    screen.update_map((0, 0), (4, 4));
    let second = screen.take().unwrap().unwrap();
    assert!(!busy(&second), "nobody had it");
    screen.update_map((0, 0), (1, 1));
    drop(second);
    assert!(busy(&screen.take().unwrap().unwrap()));
    assert_eq!(screen.figures().overlaps, 1);
}

#[test]
fn memory_that_shrinks_is_an_error() {
    let (screen, _) = screen();
    let fd = memfd(64);
    let mut same = File::from(fd.try_clone().unwrap());
    same.write_all(&[5; 64]).unwrap();
    screen.scanout_map(fd, 0, layout(4, 4)).unwrap();
    screen.take().unwrap();
    same.set_len(10).unwrap();
    assert!(screen.take().is_err());
}

#[test]
fn off_has_no_picture_and_on_has_one() {
    let (screen, calls) = screen();
    let whole = layout(4, 4);
    screen.scanout(whole, canvas(whole, 0)).unwrap();
    screen.disable();
    screen.disable();
    assert_eq!(screen.look(), Look::Off);
    assert!(screen.take().unwrap().is_none());
    screen.scanout(whole, canvas(whole, 1)).unwrap();
    assert_eq!(screen.look(), Look::News);
    assert_eq!(screen.take().unwrap().unwrap().damage, Damage::All);
    assert_eq!(calls.load(Ordering::Relaxed), 3);
}

#[test]
fn a_cursor_that_moves_is_news_of_its_own() {
    let (screen, calls) = screen();
    let whole = layout(4, 4);
    screen.scanout(whole, canvas(whole, 0)).unwrap();
    screen.take().unwrap();
    screen.mouse_set(1, 2, true);
    screen.cursor_define(CursorShape::checked(1, 1, &[0; 4]).unwrap());
    assert_eq!(screen.look(), Look::Cursor);
    let picture = screen.take().unwrap().unwrap();
    assert!(picture.damage.is_none());
    assert_eq!((picture.cursor.x, picture.cursor.y), (1, 2));
    screen.mouse_set(1, 2, true);
    assert_eq!(screen.look(), Look::Still);
    assert_eq!(calls.load(Ordering::Relaxed), 2);
}

#[test]
fn the_end_goes_before_everything() {
    let (screen, _) = screen();
    let whole = layout(4, 4);
    screen.scanout(whole, canvas(whole, 0)).unwrap();
    let gone = Error::System("first".to_owned());
    screen.fail(gone.clone());
    screen.fail(Error::System("second".to_owned()));
    assert_eq!(screen.look(), Look::Failed(gone));
    // Its memory, which may be a GPU's, is not kept for as long as somebody has the screen.
    assert_eq!(screen.size(), None);
    assert!(screen.take().unwrap().is_none());
}

fn dmabuf() -> DmaBuf {
    let fourcc = u32::from_le_bytes(*b"XR24");
    DmaBuf::checked((4, 4), fourcc, 0, vec![], false).unwrap()
}

#[test]
fn qemu_does_not_wait_with_what_is_not_in_the_picture() {
    let (screen, _) = screen();
    screen.scanout_dmabuf(dmabuf());
    let (_, mut beside) = screen.update_dmabuf((4, 0), (8, 8));
    assert!(beside.try_recv().unwrap_err() == TryRecvError::Closed);
}

#[test]
fn qemu_waits_for_a_picture_on_the_gpu_until_it_is_let_go() {
    let (screen, _) = screen();
    screen.scanout_dmabuf(dmabuf());
    let (_, mut first) = screen.update_dmabuf((0, 0), (1, 1));
    let (_, mut second) = screen.update_dmabuf((2, 2), (1, 1));
    assert!(second.try_recv().unwrap_err() == TryRecvError::Closed);
    let picture = screen.take().unwrap().unwrap();
    assert_eq!(first.try_recv(), Err(TryRecvError::Empty));
    drop(picture);
    assert_eq!(first.try_recv(), Err(TryRecvError::Closed));
}

#[test]
fn qemu_does_not_wait_again_where_nobody_looks() {
    let (screen, _) = screen();
    screen.scanout_dmabuf(dmabuf());
    let (number, mut held) = screen.update_dmabuf((0, 0), (1, 1));
    assert_eq!(held.try_recv(), Err(TryRecvError::Empty));
    screen.waited(number);
    let (_, mut free) = screen.update_dmabuf((0, 0), (1, 1));
    assert_eq!(free.try_recv(), Err(TryRecvError::Closed));
    drop(screen.take().unwrap());
    let (_, mut held) = screen.update_dmabuf((0, 0), (1, 1));
    assert_eq!(held.try_recv(), Err(TryRecvError::Empty));
}

#[test]
fn a_change_that_was_waited_with_too_long_says_nothing_of_the_next() {
    let (screen, _) = screen();
    screen.scanout_dmabuf(dmabuf());
    let (first, _taken) = screen.update_dmabuf((0, 0), (1, 1));
    let _in_use = screen.take().unwrap();
    let (second, mut held) = screen.update_dmabuf((0, 0), (1, 1));
    screen.waited(first);
    assert_eq!(held.try_recv(), Err(TryRecvError::Empty));
    screen.waited(second);
    assert_eq!(held.try_recv(), Err(TryRecvError::Closed));
}

#[test]
fn letting_go_of_the_buffer_before_switches_nothing_off() {
    let (screen, _) = screen();
    screen.scanout_dmabuf(dmabuf());
    screen.disable();
    assert_eq!(screen.look(), Look::Off, "there was none before");
    screen.scanout_dmabuf(dmabuf());
    screen.scanout_dmabuf(dmabuf());
    screen.disable();
    assert_eq!(screen.look(), Look::News);
    screen.disable();
    assert_eq!(screen.look(), Look::Off);
}

#[test]
fn switching_off_is_heeded_where_no_buffer_before_is_let_go() {
    for way in 0..4 {
        let (screen, _) = screen();
        screen.scanout_dmabuf(dmabuf());
        screen.scanout_dmabuf(dmabuf());
        let whole = layout(4, 4);
        match way {
            0 => screen.scanout(whole, canvas(whole, 0)).unwrap(),
            1 => screen.scanout_map(memfd(64), 0, whole).unwrap(),
            2 => screen.forget(),
            _ => screen.ignore(),
        }
        screen.disable();
        assert_eq!(screen.look(), Look::Off, "{way}");
    }
}

#[test]
fn what_nobody_listens_to_is_not_known() {
    let (screen, _) = screen();
    let screen = Arc::new(screen);
    let wanted = screen.listeners();
    let first = screen.listen();
    let second = screen.listen();
    assert_eq!(*wanted.borrow(), 2);
    let whole = layout(4, 4);
    screen.scanout(whole, canvas(whole, 0)).unwrap();
    screen.mouse_set(1, 1, true);
    screen.cursor_define(CursorShape::checked(1, 1, &[0; 4]).unwrap());
    drop((first, second));
    assert_eq!(*wanted.borrow(), 0);
    screen.ignore();
    assert_eq!(screen.look(), Look::Empty);
    assert!(screen.take().unwrap().is_none());
    screen.scanout(whole, canvas(whole, 1)).unwrap();
    let picture = screen.take().unwrap().unwrap();
    assert_eq!(picture.damage, Damage::All);
    // QEMU 7.2 does not say it again.
    assert!(picture.cursor.visible && picture.cursor.shape.is_some());
}
