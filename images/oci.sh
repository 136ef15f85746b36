# What is common to scripts that write OCI layouts, for them to source. They set `layout` to the directory.

digest() { sha256sum "$1" | cut -d' ' -f1; }

# A tar that depends on names and contents only.
tar_of() { # DIRECTORY [NAME...]
  local directory=$1
  shift
  [[ $# != 0 ]] || set -- .
  tar --create --directory="$directory" --format=ustar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner \
    --mode='u+rwX,go+rX,go-w' "$@"
}

# Moves a file to the blobs and prints its descriptor.
blob() { # FILE MEDIA-TYPE
  local sum size
  sum=$(digest "$1") size=$(stat -c %s "$1")
  mkdir -p "$layout/blobs/sha256"
  mv "$1" "$layout/blobs/sha256/$sum"
  jq -nc --arg type "$2" --arg digest "sha256:$sum" --argjson size "$size" '{mediaType: $type, digest: $digest, size: $size}'
}

# Writes the layout's index, of one descriptor that is called REFERENCE, and the archive of it all. containerd takes the name from the
# first annotation, skopeo and others from the second.
archive_of() { # DESCRIPTOR REFERENCE ARCHIVE
  jq -nc --argjson descriptor "$1" --arg reference "$2" '{
    schemaVersion: 2, mediaType: "application/vnd.oci.image.index.v1+json",
    manifests: [$descriptor + {annotations: {"io.containerd.image.name": $reference, "org.opencontainers.image.ref.name": $reference}}]}' \
    >"$layout/index.json"
  printf '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"
  mkdir -p "$(dirname "$3")"
  tar_of "$layout" >"$3.unfinished"
  mv "$3.unfinished" "$3"
}

# Unpacks an archive into the directory `layout`, beside what is there, and prints its descriptor, without its names.
unpacked() { # ARCHIVE
  mkdir -p "$layout"
  tar --extract --file="$1" --directory="$layout"
  jq -c '.manifests[0] | del(.annotations)' "$layout/index.json"
}
