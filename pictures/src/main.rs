//! Draws the pictures of the book into `docs/pictures/`.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .with_file_name("docs")
        .join("pictures");
    std::fs::create_dir_all(&directory)?;
    for picture in pictures::all() {
        std::fs::write(directory.join(picture.file()), picture.svg())?;
    }
    Ok(())
}
