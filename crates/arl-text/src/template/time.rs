//! `strftime_now` of transformers' templates, in UTC: a data set must not depend on the zone it was made in.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Seconds since 1970, UTC.
#[derive(Clone, Copy)]
pub(crate) struct Moment(u64);

impl Moment {
    /// The beginning of this day.
    pub(crate) fn today() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self(now - now % 86_400)
    }

    /// The beginning of the day of a text such as `2024-02-29`.
    pub(crate) fn of_date(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '-').map(|part| part.parse::<u64>().ok());
        let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
        let in_range = (1970..10_000).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
        if !in_range {
            return None;
        }
        // The inverse of `date`.
        let year = year - u64::from(month <= 2);
        let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let of_era = year % 400 * 365 + year % 400 / 4 - year % 400 / 100 + of_year;
        let moment = Self((year / 400 * 146_097 + of_era).checked_sub(719_468)? * 86_400);
        Some(moment).filter(|moment| moment.date_text() == text)
    }

    /// As `2024-02-29`.
    pub(crate) fn date_text(self) -> String {
        let (year, month, day) = self.date();
        format!("{year}-{month:02}-{day:02}")
    }

    /// Year, month from 1, day from 1 (H. Hinnant, "chrono-compatible low-level date algorithms").
    fn date(self) -> (u64, usize, u64) {
        let days = self.0 / 86_400 + 719_468;
        let era = days / 146_097;
        let of_era = days % 146_097;
        let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let shifted = (5 * of_year + 2) / 153;
        let day = of_year - (153 * shifted + 2) / 5 + 1;
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        (year + era * 400 + u64::from(month <= 2), month as usize, day)
    }

    pub(crate) fn format(self, format: &str) -> Result<String, Error> {
        let (year, month, day) = self.date();
        let (hour, minute, second) = (self.0 / 3_600 % 24, self.0 / 60 % 60, self.0 % 60);
        let weekday = DAYS[((self.0 / 86_400 + 4) % 7) as usize];
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut code = chars.next();
            let bare = code == Some('-');
            if bare {
                code = chars.next();
            }
            let padded = |value: u64| if bare { value.to_string() } else { format!("{value:02}") };
            out.push_str(&match code {
                Some('Y') => year.to_string(),
                Some('y') => padded(year % 100),
                Some('m') => padded(month as u64),
                Some('d') => padded(day),
                Some('H') => padded(hour),
                Some('I') => padded((hour + 11) % 12 + 1),
                Some('M') => padded(minute),
                Some('S') => padded(second),
                Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
                Some('B') => MONTHS[month - 1].to_owned(),
                Some('b') => MONTHS[month - 1][..3].to_owned(),
                Some('A') => weekday.to_owned(),
                Some('a') => weekday[..3].to_owned(),
                Some('%') => "%".to_owned(),
                other => {
                    let code = other.map_or(String::new(), String::from);
                    return Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: %{code} is not known")));
                }
            });
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let text = |seconds| Moment(seconds).format("%A %d %B %Y %H:%M:%S").unwrap();
        assert_eq!(text(0), "Thursday 01 January 1970 00:00:00");
        assert_eq!(text(1_709_210_096), "Thursday 29 February 2024 12:34:56");
        for date in ["1970-01-01", "1999-12-31", "2000-02-29", "2024-03-01", "2100-03-01", "9999-12-31"] {
            assert_eq!(Moment::of_date(date).unwrap().date_text(), date);
        }
        for text in ["2023-02-29", "2024-2-29", "2024-13-01", "2024-00-01", "1969-12-31", "2024-01", "today", ""] {
            assert!(Moment::of_date(text).is_none(), "{text}");
        }
        assert_eq!(Moment(951_782_400).format("%-d %b %y").unwrap(), "29 Feb 00");
    }
}
