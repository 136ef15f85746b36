//! Writes the CustomResourceDefinitions beside this crate's sources, and the reference among the docs: `make crds`.

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
    let path = here.join(reference::PAGE);
    std::fs::write(&path, reference::page())?;
    println!("{}", path.display());
    Ok(())
}
