// SPDX-License-Identifier: MIT OR Apache-2.0

//! Whether a picture is one of the known ones.

use gst_video::VideoFrameExt;
use zerocopy_test_producer::Pixels;

/// The number of the picture, whose every pixel is compared. The error says what is wrong.
pub fn compare(
    frame: &gst_video::VideoFrameRef<&gst::BufferRef>,
    pixels: Pixels,
) -> Result<u8, String> {
    let (width, height) = (frame.width() as usize, frame.height() as usize);
    let pitch = usize::try_from(frame.plane_stride()[0]).map_err(|_| "a negative pitch")?;
    let bytes = frame.plane_data(0).map_err(|error| error.to_string())?;
    // The third byte of each pixel is the number.
    let number = *bytes.get(2).ok_or("no pixel")?;
    for y in 0..height {
        let row = bytes
            .get(y * pitch..y * pitch + 4 * width)
            .ok_or_else(|| format!("row {y} is not there"))?;
        for (column, found) in row.iter().enumerate() {
            let padding = pixels == Pixels::Bgrx && column % 4 == 3;
            let drawn = pixels.byte(number, 0, y, column);
            if *found != drawn && !padding {
                let (x, byte) = (column / 4, column % 4);
                return Err(format!(
                    "byte {byte} at {x}, {y} is {found}, not {drawn} as in picture {number}"
                ));
            }
        }
    }
    Ok(number)
}
