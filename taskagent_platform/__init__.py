"""A platform that turns a description of some tools into a served tool-calling model."""
