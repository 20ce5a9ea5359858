//! An input of several files: they follow one another with [`SEPARATOR`] between, so that mutations move text from one
//! to the other and no length has to be kept right.

/// A control character on a line of its own.
const SEPARATOR: &[u8] = b"\n\x1e\n";

/// The first parts of an input, empty where there are fewer; the last has all that is left.
pub fn split<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut rest = Some(data);
    std::array::from_fn(|i| {
        let whole = rest.take().unwrap_or_default();
        if i + 1 == N {
            return whole;
        }
        let at = whole.windows(SEPARATOR.len()).position(|w| w == SEPARATOR);
        rest = at.map(|at| &whole[at + SEPARATOR.len()..]);
        &whole[..at.unwrap_or(whole.len())]
    })
}
