//! Rules of the simulator, each with a test.
