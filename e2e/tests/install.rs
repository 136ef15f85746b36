//! Installed as a user does it, on real kubelets: images, the real scheduler, and no second try.

mod cluster;
mod daemons;
mod helm;
mod manifest;
mod registry;
