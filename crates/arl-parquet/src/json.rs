//! JSON text: strings and floats as JavaScript writes them, and what a text is without parsing it.

use serde::de::IgnoredAny;

/// 0: the byte is written as it is in a string; 1: as `\u00XX`; else the letter after the backslash.
const ESCAPES: [u8; 256] = {
    let mut escapes = [0; 256];
    let mut byte = 0;
    while byte < 0x20 {
        escapes[byte] = 1;
        byte += 1;
    }
    escapes[0x08] = b'b';
    escapes[b'\t' as usize] = b't';
    escapes[b'\n' as usize] = b'n';
    escapes[0x0C] = b'f';
    escapes[b'\r' as usize] = b'r';
    escapes[b'"' as usize] = b'"';
    escapes[b'\\' as usize] = b'\\';
    escapes
};

/// Appends a string from its UTF-8. Bytes that are not UTF-8 stay what they are; the row's parser reports them.
pub(crate) fn string(out: &mut Vec<u8>, text: &[u8]) {
    out.push(b'"');
    let mut rest = text;
    while let Some(at) = rest.iter().position(|&byte| ESCAPES[byte as usize] != 0) {
        out.extend_from_slice(&rest[..at]);
        match ESCAPES[rest[at] as usize] {
            1 => out.extend_from_slice(format!("\\u{:04x}", rest[at]).as_bytes()),
            letter => out.extend_from_slice(&[b'\\', letter]),
        }
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}

/// `"name":`
pub(crate) fn key(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    string(&mut out, name.as_bytes());
    out.push(b':');
    out
}

/// A float64 as JavaScript writes it, but never as an integer: `1.0` and not `1`. NaN and infinities as Python writes them.
pub(crate) fn float(out: &mut Vec<u8>, value: f64) {
    if !value.is_finite() {
        let text = if value.is_nan() { "NaN" } else { ["Infinity", "-Infinity"][usize::from(value < 0.0)] };
        out.extend_from_slice(text.as_bytes());
        return;
    }
    // The shortest digits that read back as the same number, `d.dde-7`.
    let shortest = format!("{:e}", value.abs());
    let (mantissa, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    let digits = mantissa.replace('.', "");
    let point = exponent.parse::<i32>().unwrap_or(0) + 1;
    let length = digits.len() as i32;
    let text = match point {
        _ if value == 0.0 => "0.0".to_owned(),
        1..=21 if length <= point => format!("{digits}{}.0", "0".repeat((point - length) as usize)),
        1..=21 => format!("{}.{}", &digits[..point as usize], &digits[point as usize..]),
        -5..=0 => format!("0.{}{digits}", "0".repeat(-point as usize)),
        _ => {
            let fraction = if length > 1 { format!(".{}", &digits[1..]) } else { String::new() };
            format!("{}{fraction}e{:+}", &digits[..1], point - 1)
        }
    };
    if value.is_sign_negative() {
        out.push(b'-');
    }
    out.extend_from_slice(text.as_bytes());
}

fn is_space(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

/// Nothing but white space.
pub(crate) fn is_blank(text: &[u8]) -> bool {
    text.iter().all(is_space)
}

/// Whether a text is one array or one object, and nothing else, as brackets and strings show it. The row's parser finds
/// whatever else is wrong with it.
pub(crate) fn is_nested(text: &[u8]) -> bool {
    let mut bytes = text.iter().skip_while(|byte| is_space(byte));
    let mut depth = 0_usize;
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' if depth == 1 => return bytes.all(is_space),
            b']' | b'}' if depth > 1 => depth -= 1,
            b'"' if depth > 0 => loop {
                match bytes.next() {
                    Some(b'\\') => _ = bytes.next(),
                    Some(b'"') => break,
                    Some(0x20..) => {}
                    _ => return false,
                }
            },
            _ if depth == 0 => return false,
            _ => {}
        }
    }
    false
}

/// Whether a text is JSON; of arrays and objects only brackets and strings are looked at.
pub(crate) fn is_json(text: &[u8]) -> bool {
    is_nested(text) || serde_json::from_slice::<IgnoredAny>(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_javascript_writes_them() {
        let text = |value| {
            let mut out = Vec::new();
            float(&mut out, value);
            String::from_utf8(out).unwrap()
        };
        for (value, wanted) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (-0.5, "-0.5"),
            (f64::from(0.1_f32), "0.10000000149011612"),
            (1e-6, "0.000001"),
            (1.25e-6, "0.00000125"),
            (1e-7, "1e-7"),
            (-1.25e-7, "-1.25e-7"),
            (123_456_789_012_345_680_000.0, "123456789012345680000.0"),
            (1e21, "1e+21"),
            (1.5e300, "1.5e+300"),
            (5e-324, "5e-324"),
            (f64::MAX, "1.7976931348623157e+308"),
            (9_007_199_254_740_993.0, "9007199254740992.0"),
            (1234.5, "1234.5"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(text(value), wanted);
        }
    }

    #[test]
    fn strings_are_escaped_and_keep_bytes_that_are_not_utf8() {
        let mut out = Vec::new();
        string(&mut out, b"a\"\\\n\x08\x0C\x00\x1F\x7F/\xFF\xC3");
        assert_eq!(out, b"\"a\\\"\\\\\\n\\b\\f\\u0000\\u001f\x7F/\xFF\xC3\"");
    }

    #[test]
    fn whole_arrays_and_objects_are_nested_and_nothing_else_is() {
        for yes in ["[]", " {} \n", "[\"]\"]", "{\"a\":\"\\\"}\"}", "[[{}],[]]"] {
            assert!(is_nested(yes.as_bytes()), "{yes}");
        }
        for no in ["", "1", "\"[]\"", "[", "[]]", "[] []", "[],", "[\"\n\"]", "{\"a\":\"}", "null", "]", "[\"\\"] {
            assert!(!is_nested(no.as_bytes()), "{no}");
        }
        assert!(is_blank(b" \t\r\n") && is_blank(b"") && !is_blank(b" x"));
        for (text, wanted) in [(" 1.0", true), ("\"a\"", true), ("1e400", true), ("nul", false), ("1 2", false)] {
            assert_eq!(is_json(text.as_bytes()), wanted, "{text}");
        }
    }
}
