//! How the demo looks: headings, commands and what they print, colours where the terminal has them, and the summary.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// No line of the demo's own is longer.
const WIDTH: usize = 100;
/// What a step may take at most, whatever its own deadlines are.
const PATIENCE: Duration = Duration::from_mins(1);
/// Before whatever belongs to a step.
const MARGIN: &str = "   ";

/// The width of the longest reason of an event.
const REASON: usize = "AnnouncingNonLocal".len();

/// ANSI's "select graphic rendition" parameters.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Style {
    /// Headings and commands.
    Bold,
    /// What can be skipped.
    Dim,
    /// VIPs, and what went well.
    Green,
    /// Nodes.
    Yellow,
    /// Prompts.
    Cyan,
    /// Failures.
    Red,
}

impl Style {
    fn code(self) -> &'static str {
        match self {
            Self::Bold => "1",
            Self::Dim => "2",
            Self::Green => "32",
            Self::Yellow => "33",
            Self::Cyan => "36",
            Self::Red => "31",
        }
    }
}

/// Where the demo is shown.
pub(crate) struct Screen {
    colours: bool,
    /// Words that stand out wherever they are printed.
    highlights: Vec<(String, Style)>,
    started: Instant,
    /// Of every step its title, what it found and how long it took.
    rows: Vec<(String, String, Duration)>,
}

impl Screen {
    /// Standard output, in colours where it is a terminal and `NO_COLOR` is unset or empty.
    pub(crate) fn new() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
        Self {
            colours: std::io::stdout().is_terminal() && !unwanted && !dumb,
            highlights: Vec::new(),
            started: Instant::now(),
            rows: Vec::new(),
        }
    }

    /// Makes a word stand out wherever it is printed from now on.
    pub(crate) fn highlight(&mut self, word: impl Into<String>, style: Style) {
        self.highlights.push((word.into(), style));
    }

    /// `text` in a style.
    pub(crate) fn paint(&self, style: Style, text: &str) -> String {
        if self.colours {
            format!("\x1b[{}m{text}\x1b[0m", style.code())
        } else {
            text.to_owned()
        }
    }

    /// A line as it is.
    #[expect(clippy::unused_self, reason = "whoever prints has been handed the screen")]
    pub(crate) fn say(&self, line: &str) {
        println!("{line}");
    }

    /// Shows one step: its heading, one sentence on what to look at, the work, and how long it took.
    ///
    /// The work returns what it found in a few words, for the summary.
    pub(crate) async fn step(
        &mut self,
        title: &str,
        look: &str,
        work: impl AsyncFnOnce(&mut Self) -> Result<String>,
    ) -> Result<()> {
        self.begin(title, look);
        let started = Instant::now();
        let found = tokio::time::timeout(PATIENCE, work(self))
            .await
            .with_context(|| format!("not done within {} s", PATIENCE.as_secs()))
            .flatten()
            .with_context(|| title.to_owned())?;
        self.end(title, found, started.elapsed());
        Ok(())
    }

    /// The heading of a step, and the sentence that says what to look at.
    pub(crate) fn begin(&self, title: &str, look: &str) {
        let heading = rule(&format!("{}. {title}", self.rows.len() + 1));
        println!("\n{}", self.paint(Style::Bold, &heading));
        for line in wrapped(look, WIDTH - MARGIN.len()) {
            println!("{MARGIN}{line}");
        }
        println!();
    }

    /// The end of a step that went well.
    pub(crate) fn end(&mut self, title: &str, found: String, took: Duration) {
        let mark = self.paint(Style::Green, "✓");
        let time = self.paint(Style::Dim, &format!("({:.1} s)", took.as_secs_f64()));
        println!("{MARGIN}{mark} {} {time}", self.highlighted(&found));
        self.rows.push((title.to_owned(), found, took));
    }

    /// A command, as if typed on a host of the lab.
    pub(crate) fn command(&self, host: &str, command: &str) {
        let prompt = self.paint(Style::Cyan, &format!("{host}$"));
        println!("{MARGIN}{prompt} {}", self.paint(Style::Bold, command));
    }

    /// What a command printed, or a table; an empty line follows.
    pub(crate) fn output<Line: AsRef<str>>(&self, lines: impl IntoIterator<Item = Line>) {
        for line in lines {
            println!("{MARGIN}{}", self.highlighted(line.as_ref().trim_end()));
        }
        println!();
    }

    /// What `kubectl describe` says of an event, without its type, age and reporter.
    pub(crate) fn event(&self, reason: &str, message: &str) {
        for (number, line) in wrapped(message, WIDTH - MARGIN.len() - REASON - 1).iter().enumerate() {
            let reason = if number == 0 { reason } else { "" };
            println!("{MARGIN}{reason:width$} {}", self.highlighted(line), width = REASON);
        }
    }

    /// What has just happened, as it happens.
    pub(crate) fn note(&self, text: &str) {
        println!("{MARGIN}{}", self.highlighted(text));
    }

    /// The table of all steps, and the time it took.
    pub(crate) fn summary(&self) {
        println!("\n{}", self.paint(Style::Bold, &rule("Summary")));
        let widest = self.rows.iter().map(|(title, ..)| title.chars().count()).max();
        let widest = widest.unwrap_or_default();
        for (number, (title, found, took)) in self.rows.iter().enumerate() {
            let found = wrapped(found, WIDTH - MARGIN.len() - widest - 15);
            for (line, found) in found.iter().enumerate() {
                let (title, time) = match line {
                    0 => (
                        format!("{:>2}. {title}", number + 1),
                        format!("{:>5.1} s", took.as_secs_f64()),
                    ),
                    _ => (String::new(), String::new()),
                };
                let time = self.paint(Style::Dim, &format!("{time:7}"));
                println!(
                    "{title:width$}  {time}  {}",
                    self.highlighted(found),
                    width = widest + 4
                );
            }
        }
        let total = self.started.elapsed().as_secs_f64();
        println!(
            "\n{}",
            self.paint(Style::Green, &format!("Everything shown was checked. {total:.0} s."))
        );
    }

    /// Why it ends before its time.
    pub(crate) fn failure(&self, error: &anyhow::Error) {
        let text = format!("✗ Failed: {error:#}");
        let lines = text.lines().flat_map(|line| wrapped(line, WIDTH));
        println!();
        for line in lines {
            println!("{}", self.paint(Style::Red, &line));
        }
    }

    fn highlighted(&self, text: &str) -> String {
        if !self.colours {
            return text.to_owned();
        }
        self.highlights.iter().fold(text.to_owned(), |text, (word, style)| {
            replace_words(&text, word, &self.paint(*style, word))
        })
    }
}

/// A line across the screen with a title in it.
fn rule(title: &str) -> String {
    let heading = format!("── {title} ");
    let rest = WIDTH.saturating_sub(heading.chars().count());
    heading + &"─".repeat(rest)
}

/// Replaces `word` where it is no part of a longer word: `m` is a node, and not the one in `from`.
fn replace_words(text: &str, word: &str, by: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(word) {
        let (before, found) = rest.split_at(at);
        let after = found.strip_prefix(word).unwrap_or_default();
        let alone = !before.ends_with(is_of_word) && !after.starts_with(is_of_word);
        out.push_str(before);
        out.push_str(if alone { by } else { word });
        rest = after;
    }
    out + rest
}

/// `.` ends sentences as well; what matters is that 10.31.188.1 is not found in 10.31.188.100.
fn is_of_word(character: char) -> bool {
    character.is_alphanumeric() || matches!(character, '-' | '_' | '\x1b' | '[')
}

/// Breaks a text into lines of at most `width` characters between its words.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        if let Some(line) = lines.last_mut() {
            if line.is_empty() {
                word.clone_into(line);
                continue;
            }
            if line.chars().count() + 1 + word.chars().count() <= width {
                line.push(' ');
                line.push_str(word);
                continue;
            }
        }
        lines.push(word.to_owned());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_replaced_only_where_they_stand_alone() {
        for (name, text, expected) in [
            ("alone", "m", "<m>"),
            ("part of another", "from w11m m-pod2", "from w11m m-pod2"),
            ("twice, and at the end", "m, then m.", "<m>, then <m>."),
        ] {
            assert_eq!(replace_words(text, "m", "<m>"), expected, "{name}");
        }
        assert_eq!(replace_words("10.31.188.100", "10.31.188.1", "x"), "10.31.188.100");
        assert_eq!(replace_words("10.31.188.64/16", "10.31.188.64", "x"), "x/16");
    }

    #[test]
    fn lines_break_between_words() {
        for (name, text, expected) in [
            ("short", "one two", &["one two"][..]),
            ("long", "one two three", &["one two", "three"]),
            ("a word too long", "one enormously", &["one", "enormously"]),
            ("nothing", "", &[""]),
        ] {
            assert_eq!(wrapped(text, 8), expected, "{name}");
        }
    }
}
