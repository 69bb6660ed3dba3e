//! A JSON object's text, changed member by member: everything else keeps its bytes.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::Value;
use serde_json::value::RawValue;

/// The text of one JSON object.
#[derive(Clone, Debug)]
pub(super) struct ObjectText(String);

impl ObjectText {
    /// `None`: the text is not a JSON object.
    pub(super) fn new(text: String) -> Option<Self> {
        members(&text)?;
        Some(Self(text))
    }

    pub(super) fn into_text(self) -> String {
        self.0
    }

    /// The value of a member. Of several with one name the last one counts, as for most readers of JSON.
    pub(super) fn get(&self, key: &str) -> Option<Value> {
        serde_json::from_str(self.0.get(self.place(key)?)?).ok()
    }

    /// [`ObjectText::get`]; null is the same as absent.
    pub(super) fn get_non_null(&self, key: &str) -> Option<Value> {
        self.get(key).filter(|value| !value.is_null())
    }

    /// The value of a member that is an object, with its text.
    pub(super) fn object(&self, key: &str) -> Option<ObjectText> {
        ObjectText::new(self.0.get(self.place(key)?)?.to_owned())
    }

    /// Sets a member's value, which is JSON. A new member becomes the last one.
    pub(super) fn set(&mut self, key: &str, value: &str) {
        if let Some(place) = self.place(key) {
            self.0.replace_range(place, value);
            return;
        }
        let name = Value::from(key);
        let ends = members(&self.0).into_iter().flatten().map(|(_, place)| place.end);
        let open = self.0.find('{').map_or(0, |at| at + 1);
        match ends.max() {
            None => self.0.insert_str(open, &format!("{name}: {value}")),
            Some(end) => {
                // Indented as the first member is.
                let first = self.0[open..].find('"').map_or(open, |at| open + at);
                let space = self.0[open..first].to_owned();
                self.0.insert_str(end, &format!(",{space}{name}: {value}"));
            }
        }
    }

    /// Removes a member. Returns whether there was one.
    pub(super) fn remove(&mut self, key: &str) -> bool {
        let mut found = false;
        // Once for each member of this name.
        while let Some(place) = self.place(key) {
            found = true;
            let before = members(&self.0).into_iter().flatten().map(|(_, other)| other.end);
            let range = match before.filter(|&end| end <= place.start).max() {
                Some(end) => end..place.end,
                None => {
                    let open = self.0.find('{').map_or(0, |at| at + 1);
                    let rest = &self.0[place.end..];
                    let comma = rest.find(|c: char| !c.is_ascii_whitespace()).filter(|&at| rest[at..].starts_with(','));
                    open..place.end + comma.map_or(0, |at| at + 1)
                }
            };
            self.0.replace_range(range, "");
        }
        found
    }

    /// Where the value of a member is in the text.
    fn place(&self, key: &str) -> Option<Range<usize>> {
        members(&self.0)?.remove(key)
    }
}

/// Where the value of each member is in the text of an object.
fn members(text: &str) -> Option<BTreeMap<String, Range<usize>>> {
    let members: BTreeMap<String, &RawValue> = serde_json::from_str(text).ok()?;
    let place = |value: &RawValue| {
        // The value borrows from the text.
        let start = value.get().as_ptr() as usize - text.as_ptr() as usize;
        start..start + value.get().len()
    };
    Some(members.into_iter().map(|(key, value)| (key, place(value))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRETTY: &str = "{\n  \"a\": [1, {\"b\": 2}],\n  \"b\" : \"x\\\"}\",\n  \"c\": null\n}\n";

    #[test]
    fn a_value_is_replaced_and_nothing_else_changes() {
        let mut object = ObjectText::new(PRETTY.to_owned()).unwrap();
        object.set("b", "[1, 2]");
        assert_eq!(object.0, PRETTY.replace("\"x\\\"}\"", "[1, 2]"));
        object.set("d", "true");
        assert_eq!(object.get("d"), Some(Value::Bool(true)));
        assert!(object.0.ends_with("\"c\": null,\n  \"d\": true\n}\n"), "{}", object.0);
        assert_eq!((object.get("c"), object.get_non_null("c")), (Some(Value::Null), None));
    }

    #[test]
    fn any_member_can_be_removed_from_any_object() {
        for text in
            [PRETTY, "{}", "{ }", r#"{"a":1}"#, r#" {"a" : 1 , "b":2,"c":{"a":3}} "#, r#"{"a":1,"a":2,"b":3,"a":4}"#]
        {
            for key in ["a", "b", "c", "none"] {
                let mut object = ObjectText::new(text.to_owned()).unwrap();
                let mut expected: Value = serde_json::from_str(text).unwrap();
                let there = expected.as_object_mut().unwrap().shift_remove(key).is_some();
                assert_eq!(object.remove(key), there, "{text} {key}");
                assert_eq!(serde_json::from_str::<Value>(&object.0).unwrap(), expected, "{text} {key}");
                let mut object = ObjectText::new(text.to_owned()).unwrap();
                object.set(key, "\"new\"");
                assert_eq!(object.get(key), Some(Value::from("new")), "{text} {key}");
            }
        }
        let mut object = ObjectText::new(PRETTY.to_owned()).unwrap();
        object.remove("b");
        assert_eq!(object.0, "{\n  \"a\": [1, {\"b\": 2}],\n  \"c\": null\n}\n");
        object.remove("a");
        assert_eq!(object.0, "{\n  \"c\": null\n}\n");
        object.remove("c");
        assert_eq!(object.into_text(), "{\n}\n");
        assert!(ObjectText::new("[1]".to_owned()).is_none() && ObjectText::new("{".to_owned()).is_none());
    }
}
