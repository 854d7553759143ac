"""`fastdpo merge`: an adapter becomes a part of its model."""
