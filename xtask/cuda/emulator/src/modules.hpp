// PTX modules and the compiled kernels that stand for their entries. See modules.cpp.
#pragma once

#include "engine.hpp"

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

struct Module;

// What a CUfunction points at.
struct Function {
    std::string name;
    const Module *module;
    const Kernel *kernel = nullptr;                // null if no plug-in has it
    std::vector<unsigned> parameter_sizes;         // as the PTX declares them
    unsigned max_threads = max_threads_per_block;  // .maxntid, from __launch_bounds__
    size_t dynamic_shared_limit = max_shared_memory_unasked;
};

struct Module {
    std::map<std::string, Function> functions;
};

// Loads the plug-ins: once, before the first module.
void load_plugins();
// Null, with a reason on stderr, if the text is no PTX.
Module *load_module(const char *ptx);
void unload_module(Module *module);
bool is_module(const Module *module);
bool is_function(const Function *function);
// Null, with a reason on stderr, if the module lacks it or no plug-in can run it.
Function *find_function(Module *module, const char *name);

}  // namespace emulator
