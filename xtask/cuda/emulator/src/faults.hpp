#pragma once

namespace emulator {

// Installs the handlers, once for the process.
void catch_faults();
// Gives the calling thread a stack for them: a fiber's may be what overflowed.
void catch_faults_on_this_thread();

}  // namespace emulator
