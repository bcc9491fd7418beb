"""Transfer: detectors on a pre-trained trunk, from packages that pip installs."""
