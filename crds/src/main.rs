//! Writes the CustomResourceDefinitions beside this crate's sources: `make crds`.

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    for (file, definition) in crds::manifest::definitions() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        std::fs::write(&path, crds::manifest::yaml(&definition)?)?;
        println!("{}", path.display());
    }
    Ok(())
}
