//! Are samples of all classes among what statistics were re-estimated on?

use super::scores::Opinion;

/// Why re-estimated statistics are not to be trusted, if they are not, from the predictions on the same samples with the
/// file's statistics and with the new ones.
pub fn labels(original: &Opinion, new: &Opinion) -> Option<String> {
    let (was, is) = (original.health(), new.health());
    (is.classes < 0.6 * was.classes).then(|| "?".to_string())
}
