"""The only modules that know a peer."""
