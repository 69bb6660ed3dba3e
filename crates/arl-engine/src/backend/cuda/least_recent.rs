//! A map that keeps what was used last: for plans, of which packed batches could otherwise make as many as they have sizes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;

/// At most `most` values by their keys; the least recently used one makes room.
pub(super) struct LeastRecent<K, V> {
    /// With the number of the call that used each last.
    values: HashMap<K, (V, u64)>,
    calls: u64,
    most: usize,
}

impl<K: Eq + Hash + Copy, V> LeastRecent<K, V> {
    pub(super) fn new(most: usize) -> Self {
        LeastRecent { values: HashMap::new(), calls: 0, most }
    }

    /// The value of a key, which `make` makes where there is none.
    pub(super) fn get_or_make<E>(&mut self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<&mut V, E> {
        self.calls += 1;
        if !self.values.contains_key(&key) && self.values.len() >= self.most {
            let oldest = self.values.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key);
            let value = make()?;
            oldest.map(|key| self.values.remove(&key));
            return Ok(&mut self.values.entry(key).or_insert((value, self.calls)).0);
        }
        let (value, used) = match self.values.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert((make()?, 0)),
        };
        *used = self.calls;
        Ok(value)
    }

    /// Forgets all values.
    pub(super) fn clear(&mut self) {
        self.values.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_value_makes_room_and_no_other() {
        let mut kept = LeastRecent::new(3);
        let mut made = Vec::new();
        for key in [1, 2, 3, 1, 4, 1, 3, 2] {
            let value = kept.get_or_make(key, || {
                made.push(key);
                Ok::<_, ()>(10 * key)
            });
            assert_eq!(value, Ok(&mut (10 * key)));
        }
        // 4 took the place of 2, and 2 that of 4.
        assert_eq!(made, [1, 2, 3, 4, 2]);
        assert_eq!(kept.values.len(), 3);
    }

    #[test]
    fn what_cannot_be_made_takes_no_place_and_what_is_cleared_is_made_again() {
        let mut kept = LeastRecent::new(1);
        kept.get_or_make(1, || Ok::<_, ()>(1)).unwrap();
        assert_eq!(kept.get_or_make(2, || Err("no")), Err("no"));
        assert_eq!(kept.get_or_make(1, || Err("made twice")), Ok(&mut 1));
        kept.clear();
        assert_eq!(kept.get_or_make(1, || Err("made again")), Err("made again"));
    }
}
