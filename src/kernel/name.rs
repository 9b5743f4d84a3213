//! Words of the names of configurations.

/// A word for a number, if it is more than one.
pub fn several(count: u32, word: impl FnOnce(u32) -> String) -> String {
    if count > 1 { word(count) } else { String::new() }
}

/// A word, if something holds.
pub fn given(holds: bool, word: &'static str) -> &'static str {
    if holds { word } else { "" }
}
