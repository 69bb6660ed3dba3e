//! What a template can write by itself: its text and the strings in its code.

/// The text outside of tags and the quoted strings inside of them, one a line of its own.
pub(super) fn literals(source: &str) -> String {
    let mut out = String::new();
    let mut rest = source;
    while let Some(open) = rest.find('{') {
        let close = match rest.as_bytes().get(open + 1) {
            Some(b'{') => "}}",
            Some(b'%') => "%}",
            Some(b'#') => "#}",
            _ => {
                out.push_str(&rest[..=open]);
                rest = &rest[open + 1..];
                continue;
            }
        };
        out.push_str(&rest[..open]);
        out.push('\0');
        rest = &rest[open + 2..];
        if close == "#}" {
            rest = rest.find(close).map_or("", |end| &rest[end + 2..]);
        } else {
            rest = strings(rest, close, &mut out);
        }
    }
    out.push_str(rest);
    out
}

/// Collects the strings of a tag; returns what follows it.
fn strings<'a>(tag: &'a str, close: &str, out: &mut String) -> &'a str {
    let mut chars = tag.char_indices();
    while let Some((at, c)) = chars.next() {
        if tag[at..].starts_with(close) {
            return &tag[at + close.len()..];
        }
        if c != '\'' && c != '"' {
            continue;
        }
        while let Some((_, inner)) = chars.next() {
            match inner {
                '\\' => match chars.next() {
                    Some((_, 'n')) => out.push('\n'),
                    Some((_, 't')) => out.push('\t'),
                    Some((_, 'r')) => out.push('\r'),
                    Some((_, other)) => out.push(other),
                    None => {}
                },
                inner if inner == c => break,
                inner => out.push(inner),
            }
        }
        out.push('\0');
    }
    ""
}

#[cfg(test)]
mod tests {
    use super::literals;

    #[test]
    fn text_and_strings_are_found_and_code_is_not() {
        let found = literals("a{b\n{%- if m['role'] == \"us\\\"er\" %}c{# 'no' #}{{- 'x\\n}}y' ~ loop.index0 }}d");
        for piece in ["a{b\n", "role", "us\"er", "c", "x\n}}y", "d"] {
            assert!(found.split('\0').any(|own| own == piece), "{piece:?} of {found:?}");
        }
        assert!(!found.contains("no") && !found.contains("loop") && !found.contains('0'), "{found:?}");
    }
}
