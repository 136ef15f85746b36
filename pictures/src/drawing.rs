//! What pictures are made of: boxes, words and arrows on a panel that is light or dark as the reader's screen is.
//!
//! Each is 480 units wide, so that on a telephone its words are still words, and has its own background: the book's theme and the
//! reader's screen may differ.

use std::fmt::Write as _;

/// Width of all pictures.
pub const WIDTH: u32 = 480;

/// What does not depend on light.
const SHAPES: &str = "svg{font-family:system-ui,'DejaVu Sans',sans-serif;font-size:14px}.small{font-size:12px}.strong{font-weight:600}\
.code{font-family:ui-monospace,'DejaVu Sans Mono',monospace;font-size:12px}rect,line{stroke-width:1.5}.go,.stop{stroke-width:2}\
.paper,.bar,.bar-good,marker path{stroke:none}.dash{stroke-dasharray:5 4}.halo{paint-order:stroke;stroke-width:5px}";

/// Colours: of ink, paper, boxes, edges, what is good, what is bad, and notes.
struct Colours {
    ink: &'static str,
    paper: &'static str,
    soft: &'static str,
    edge: &'static str,
    good: &'static str,
    bad: &'static str,
    note: &'static str,
}

const LIGHT: Colours = Colours {
    ink: "#1f2328",
    paper: "#ffffff",
    soft: "#eef1f4",
    edge: "#6e7781",
    good: "#1a7f37",
    bad: "#cf222e",
    note: "#0550ae",
};

const DARK: Colours = Colours {
    ink: "#e6edf3",
    paper: "#161b22",
    soft: "#262c36",
    edge: "#8d96a0",
    good: "#3fb950",
    bad: "#ff7b72",
    note: "#79c0ff",
};

impl Colours {
    fn style(&self) -> String {
        let Self {
            ink,
            paper,
            soft,
            edge,
            good,
            bad,
            note,
        } = self;
        format!(
            "text{{fill:{ink}}}text.good{{fill:{good}}}text.bad{{fill:{bad}}}text.note{{fill:{note}}}text.halo{{stroke:{paper}}}rect,line{{stroke:{edge}}}\
             rect{{fill:none}}rect.paper{{fill:{paper}}}rect.box{{fill:{soft}}}rect.bar{{fill:{edge}}}rect.bar-good{{fill:{good}}}\
             line.go{{stroke:{good}}}line.stop{{stroke:{bad}}}.m-head path{{fill:{edge}}}.m-go path{{fill:{good}}}"
        )
    }
}

/// A picture that is being drawn.
#[derive(Debug)]
pub struct Drawing {
    name: &'static str,
    title: &'static str,
    height: u32,
    body: String,
}

impl Drawing {
    /// An empty panel. `title` is what who cannot see it is told.
    pub fn new(name: &'static str, title: &'static str, height: u32) -> Self {
        Self {
            name,
            title,
            height,
            body: String::new(),
        }
    }

    /// The name of its file.
    pub fn file(&self) -> String {
        format!("{}.svg", self.name)
    }

    /// Words that begin at a place, their baseline at `y`.
    pub fn words(&mut self, x: u32, y: u32, class: &str, words: &str) -> &mut Self {
        self.text(x, y, class, "start", words)
    }

    /// Words around a place.
    pub fn centred(&mut self, x: u32, y: u32, class: &str, words: &str) -> &mut Self {
        self.text(x, y, class, "middle", words)
    }

    fn text(&mut self, x: u32, y: u32, class: &str, anchor: &str, words: &str) -> &mut Self {
        let words = escaped(words);
        self.add(&format!(
            "<text x=\"{x}\" y=\"{y}\" class=\"{class}\" text-anchor=\"{anchor}\">{words}</text>"
        ))
    }

    /// A box with lines of words in its middle, of which the first is strong.
    pub fn labelled(&mut self, (x, y): (u32, u32), (width, height): (u32, u32), lines: &[&str]) -> &mut Self {
        self.rect((x, y), (width, height), "box");
        let count = u32::try_from(lines.len()).unwrap_or(1);
        let first = y + (height + 14).saturating_sub(17 * count.saturating_sub(1)) / 2 - 2;
        for (number, line) in (0..).zip(lines) {
            let class = if number == 0 { "strong" } else { "small" };
            self.centred(x + width / 2, first + 17 * number, class, line);
        }
        self
    }

    /// A rectangle with round corners.
    pub fn rect(&mut self, (x, y): (u32, u32), (width, height): (u32, u32), class: &str) -> &mut Self {
        self.add(&format!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"5\" class=\"{class}\"/>"
        ))
    }

    /// A line.
    pub fn line(&mut self, from: (u32, u32), to: (u32, u32), class: &str) -> &mut Self {
        self.segment(from, to, class, "")
    }

    /// A line with an arrow's head at its end.
    pub fn arrow(&mut self, from: (u32, u32), to: (u32, u32), class: &str) -> &mut Self {
        let head = if class.contains("go") { "head-go" } else { "head" };
        self.segment(from, to, class, &format!(" marker-end=\"url(#{head})\""))
    }

    fn segment(&mut self, from: (u32, u32), to: (u32, u32), class: &str, more: &str) -> &mut Self {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.add(&format!(
            "<line x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\" class=\"{class}\"{more}/>"
        ))
    }

    fn add(&mut self, element: &str) -> &mut Self {
        let _ = writeln!(self.body, "{element}");
        self
    }

    /// The picture as SVG.
    pub fn svg(&self) -> String {
        let Self {
            title, height, body, ..
        } = self;
        let style = format!(
            "{SHAPES}{}@media (prefers-color-scheme:dark){{{}}}",
            LIGHT.style(),
            DARK.style()
        );
        let head = |id: &str| {
            format!(
                "<marker id=\"{id}\" class=\"m-{}\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"9\" markerHeight=\"9\" \
                 markerUnits=\"userSpaceOnUse\" orient=\"auto\"><path d=\"M0 0 8 4 0 8z\"/></marker>",
                id.trim_start_matches("head-")
            )
        };
        format!(
            "<!-- Drawn by `make pictures`: edit pictures/src/lib.rs. -->\n<svg xmlns=\"http://www.w3.org/2000/svg\" \
             width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n<title>{}</title>\n\
             <style>{style}</style>\n<defs>{}{}</defs>\n<rect class=\"paper\" width=\"{WIDTH}\" height=\"{height}\" rx=\"8\"/>\n{body}</svg>\n",
            escaped(title),
            head("head"),
            head("head-go"),
        )
    }
}

fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
