//! How reports are shown: tables for people, JSON and YAML for programs.

use std::fmt::Write as _;

use serde::Serialize;

/// What a report is shown as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Tables and sentences.
    #[default]
    Table,
    /// The same with more columns.
    Wide,
    /// JSON, as the docs describe it.
    Json,
    /// The same as YAML.
    Yaml,
    /// The names of the objects alone, one on each line.
    Name,
}

/// A colour, where the terminal has any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// All is well.
    Green,
    /// Something is to be looked at.
    Yellow,
    /// Something is broken.
    Red,
    /// Less important than the rest.
    Grey,
    /// A heading.
    Bold,
}

/// How text is written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ink {
    /// With colours.
    pub has_colours: bool,
    /// With more columns.
    pub is_wide: bool,
}

impl Ink {
    /// A text in a colour.
    pub fn paint(self, colour: Colour, text: &str) -> String {
        if !self.has_colours || text.is_empty() {
            return text.to_owned();
        }
        let code = match colour {
            Colour::Green => "32",
            Colour::Yellow => "33",
            Colour::Red => "31",
            Colour::Grey => "90",
            Colour::Bold => "1",
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}

/// What a verb comes to.
pub trait Report: Serialize {
    /// Its kind in JSON.
    const KIND: &'static str;

    /// It as text.
    fn text(&self, ink: Ink) -> String;

    /// The names of the objects in it.
    fn names(&self) -> Vec<String> {
        Vec::new()
    }
}

/// A report with what says how to read it.
#[derive(Serialize)]
struct Envelope<'a, R> {
    /// Its kind.
    kind: &'static str,
    /// Of what is in it. It is raised when a field changes its meaning or goes.
    version: u32,
    #[serde(flatten)]
    report: &'a R,
}

/// A report in a format.
///
/// # Errors
/// When it cannot be written as JSON or YAML, which does not happen.
pub fn render<R: Report>(report: &R, format: Format, ink: Ink) -> anyhow::Result<String> {
    let envelope = Envelope {
        kind: R::KIND,
        version: 1,
        report,
    };
    Ok(match format {
        Format::Table | Format::Wide => report.text(ink),
        Format::Json => serde_json::to_string_pretty(&envelope)? + "\n",
        Format::Yaml => {
            let value = serde_json::to_value(&envelope)?;
            let text = serde_saphyr::to_string(&value)?;
            if text.ends_with('\n') { text } else { text + "\n" }
        }
        Format::Name => report.names().iter().fold(String::new(), |mut text, name| {
            let _ = writeln!(text, "{name}");
            text
        }),
    })
}

/// Rows with columns that stand below each other.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<(Vec<String>, Option<Colour>)>,
}

impl Table {
    /// A table with a heading.
    pub fn new(heading: &[&str]) -> Self {
        let heading = heading.iter().map(|text| (*text).to_owned()).collect();
        Self {
            rows: vec![(heading, Some(Colour::Bold))],
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push((cells.into_iter().collect(), None));
    }

    /// Adds a row whose last cell has a colour.
    pub fn painted(&mut self, cells: impl IntoIterator<Item = String>, colour: Option<Colour>) {
        self.rows.push((cells.into_iter().collect(), colour));
    }

    /// How many rows there are below the heading.
    pub const fn len(&self) -> usize {
        self.rows.len().saturating_sub(1)
    }

    /// Whether there is no row below the heading.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The text.
    pub fn text(&self, ink: Ink) -> String {
        let mut widths: Vec<usize> = Vec::new();
        for (cells, _) in &self.rows {
            for (column, cell) in cells.iter().enumerate() {
                let width = cell.chars().count();
                match widths.get_mut(column) {
                    Some(known) => *known = (*known).max(width),
                    None => widths.push(width),
                }
            }
        }
        let mut text = String::new();
        for (number, (cells, colour)) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, cell) in cells.iter().enumerate() {
                let is_last = column + 1 == cells.len();
                let shown = match colour {
                    Some(colour) if is_last || number == 0 => ink.paint(*colour, cell),
                    _ => cell.clone(),
                };
                line.push_str(&shown);
                if !is_last {
                    let width = widths.get(column).copied().unwrap_or_default();
                    let fill = width.saturating_sub(cell.chars().count()) + 2;
                    line.push_str(&" ".repeat(fill));
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// A cell of many: the first few of a list.
pub fn some<T: ToString>(items: impl IntoIterator<Item = T>, most: usize, separator: &str) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    let more = items.len().saturating_sub(most);
    let mut shown: Vec<String> = items.into_iter().take(most).collect();
    if more > 0 {
        shown.push(format!("{more} more"));
    }
    shown.join(separator)
}

/// A dash where there is nothing.
pub fn or_dash(text: Option<impl Into<String>>) -> String {
    text.map(Into::into)
        .filter(|text: &String| !text.is_empty())
        .unwrap_or_else(|| "–".to_owned())
}

/// A length of time as people say it: the largest unit, and the next one where it is small.
pub fn age(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, 1..=9) if seconds % 60 != 0 => format!("{minutes}m{}s", seconds % 60),
        (0, 0, _) => format!("{minutes}m"),
        (0, 1..=9, _) if minutes % 60 != 0 => format!("{hours}h{}m", minutes % 60),
        (0, _, _) => format!("{hours}h"),
        (1..=9, _, _) if hours % 24 != 0 => format!("{days}d{}h", hours % 24),
        _ => format!("{days}d"),
    }
}

/// How many: `1 Service`, `2 Services`.
pub fn count(number: usize, one: &str) -> String {
    if number == 1 {
        format!("1 {one}")
    } else {
        let end = if one.ends_with('s') { "es" } else { "s" };
        format!("{number} {one}{end}")
    }
}

/// A bar of ten cells.
pub fn bar(used: u64, all: u64) -> String {
    let full = if all == 0 {
        0
    } else {
        // What is used is shown, however little of much it is.
        let tenths = u128::from(used).saturating_mul(10).div_ceil(u128::from(all));
        usize::try_from(tenths.min(10)).unwrap_or(10)
    };
    let full = if full == 10 && used < all { 9 } else { full };
    format!("{}{}", "▇".repeat(full), "░".repeat(10 - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_bars_are_short_and_not_wrong() {
        for (seconds, expected) in [
            (-3, "0s"),
            (59, "59s"),
            (60, "1m"),
            (90, "1m30s"),
            (3_599, "59m"),
            (3_660, "1h1m"),
            (86_400, "1d"),
            (90_000, "1d1h"),
            (8_640_000, "100d"),
        ] {
            assert_eq!(age(seconds), expected);
        }
        assert_eq!(bar(0, 0), "░░░░░░░░░░");
        assert_eq!(bar(1, 1000), "▇░░░░░░░░░");
        assert_eq!(bar(999, 1000), "▇▇▇▇▇▇▇▇▇░");
        assert_eq!(bar(3, 3), "▇▇▇▇▇▇▇▇▇▇");
        assert_eq!(bar(u64::MAX / 2, u64::MAX), "▇▇▇▇▇░░░░░");
    }

    #[test]
    fn columns_stand_below_each_other_and_lines_end_with_text() {
        let mut table = Table::new(&["A", "LONG"]);
        table.row(["äöü…".to_owned(), String::new()]);
        table.row(["x".to_owned(), "y".to_owned()]);
        assert_eq!(table.text(Ink::default()), "A     LONG\näöü…\nx     y\n");
    }
}
