//! Writes the CustomResourceDefinitions beside this crate's sources, and the reference and the events among the docs: `make crds`.

mod reference;

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (file, definition) in crds::manifest::definitions() {
        let path = here.join(file);
        std::fs::write(&path, crds::manifest::yaml(&definition)?)?;
        println!("{}", path.display());
    }
    for (path, page) in [
        (reference::PAGE, reference::page()),
        ("../docs/events.md", crds::events::page()),
    ] {
        let path = here.join(path);
        std::fs::write(&path, page)?;
        println!("{}", path.display());
    }
    Ok(())
}
