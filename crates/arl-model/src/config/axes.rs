//! Positions of three axes: time, height and width.

use serde_json::{Value, json};

use super::keys::Keys;
use crate::Result;

/// Which axis of a position (time, height, width) turns each of the `rotary_dim / 2` frequencies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeAxes {
    /// Frequencies of each axis.
    pub sections: [usize; 3],
    /// Frequencies of height and width alternate with those of time, as in Qwen3-VL; else each axis has consecutive ones, as
    /// in Qwen2.5-VL.
    pub interleaved: bool,
}

impl RopeAxes {
    /// The axis of frequency `i`: 0 is time, 1 height, 2 width.
    pub fn axis(&self, i: usize) -> usize {
        let [time, height, width] = self.sections;
        match (self.interleaved, i % 3) {
            (true, 1) if i < 3 * height => 1,
            (true, 2) if i < 3 * width => 2,
            (true, _) => 0,
            (false, _) => usize::from(i >= time) + usize::from(i >= time + height),
        }
    }
}

/// The axes of a family that has `default` where no key says them; `None`: it has no images. Whether they alternate is the family's
/// choice, whatever `mrope_interleaved` says.
pub(super) fn read(keys: &mut Keys<'_>, default: Option<RopeAxes>, hybrid: bool) -> Result<Option<RopeAxes>> {
    let Some(default) = default else {
        if hybrid {
            keys.get("mrope_interleaved");
            keys.get("mrope_section");
        }
        return Ok(None);
    };
    keys.get("mrope_interleaved");
    let Some(list) = keys.optional_list("mrope_section")? else { return Ok(Some(default)) };
    let size =
        |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size <= 1 << 16);
    match list.iter().map(size).collect::<Option<Vec<usize>>>().as_deref() {
        Some(&[time, height, width]) => Ok(Some(RopeAxes { sections: [time, height, width], ..default })),
        _ => {
            let expected = "must be a list of three whole numbers: how many frequencies time, height and width turn";
            Err(keys.error("mrope_section", format_args!("{expected}; it is {}", json!(list))))
        }
    }
}
