// A program brings its kernels as PTX. The emulator only reads the PTX's entries: their names, parameter
// sizes and launch bounds. The code comes from plug-ins, shared libraries made of the same sources by
// build.py: the folder $CUDA_EMULATOR_KERNELS, else `kernels` beside libcuda.so.1.
#include "modules.hpp"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <dlfcn.h>
#include <filesystem>
#include <mutex>
#include <set>

namespace emulator {
namespace {

struct Plugin {
    std::string path;
    std::map<std::string, Kernel> kernels;
};

std::recursive_mutex mutex;
std::vector<std::unique_ptr<Plugin>> &plugins() {
    static auto *list = new std::vector<std::unique_ptr<Plugin>>;
    return *list;
}
// The handles that are valid.
std::set<const Module *> &modules() {
    static auto *set = new std::set<const Module *>;
    return *set;
}
std::set<const Function *> &functions() {
    static auto *set = new std::set<const Function *>;
    return *set;
}

std::filesystem::path plugin_folder() {
    if (const char *folder = getenv("CUDA_EMULATOR_KERNELS")) return folder;
    Dl_info info;
    if (!dladdr(reinterpret_cast<void *>(&load_plugins), &info)) return "kernels";
    return std::filesystem::path(info.dli_fname).parent_path() / "kernels";
}

// A reader of PTX that knows just enough to find entries and the directives in front of their bodies.
class Reader {
public:
    explicit Reader(const char *text) : at_(text) {}

    // The next word: a run of letters, digits, '.', '_', '$', '%', or one other character. Empty at the end.
    std::string next() {
        skip();
        const char *begin = at_;
        if (!*at_) return "";
        if (!word(*at_)) return std::string(1, *at_++);
        while (word(*at_)) at_++;
        return std::string(begin, at_);
    }

private:
    static bool word(char c) {
        return isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '$' || c == '%';
    }

    void skip() {
        for (;;) {
            if (isspace(static_cast<unsigned char>(*at_))) at_++;
            else if (!strncmp(at_, "//", 2)) at_ += strcspn(at_, "\n");
            else if (!strncmp(at_, "/*", 2))
                at_ = strstr(at_ + 2, "*/") ? strstr(at_ + 2, "*/") + 2 : at_ + strlen(at_);
            else return;
        }
    }

    const char *at_;
};

// The size of the parameter type ".u64", ".f32", ".b8", ...; 0 if the word is no type.
unsigned type_size(const std::string &word) {
    if (word.size() < 3 || word[0] != '.' || !strchr("usbf", word[1])) return 0;
    unsigned bits = unsigned(strtoul(word.c_str() + 2, nullptr, 10));
    return bits % 8 == 0 ? bits / 8 : 0;
}

// ".entry" has been read: the name, "(" parameters ")", directives, up to the body's "{".
Function read_entry(Reader &reader) {
    Function function;
    function.name = reader.next();
    std::string word = reader.next();
    if (word == "(") {
        while (!(word = reader.next()).empty() && word != ")") {
            if (word == ".param") function.parameter_sizes.push_back(0);
            else if (word == "[")
                function.parameter_sizes.back() *= unsigned(strtoul(reader.next().c_str(), nullptr, 10));
            else if (unsigned size = type_size(word); size && !function.parameter_sizes.empty())
                function.parameter_sizes.back() = size;
        }
    }
    while (!word.empty() && word != "{" && word != ";") {
        if (word == ".maxntid") {
            function.max_threads = unsigned(strtoul(reader.next().c_str(), nullptr, 10));
            while ((word = reader.next()) == ",")
                function.max_threads *= unsigned(strtoul(reader.next().c_str(), nullptr, 10));
        } else {
            word = reader.next();
        }
    }
    return function;
}

// A stale plug-in: its kernel's parameters are not the PTX's.
bool same_parameters(const Function &function, const Kernel &kernel) {
    const auto &sizes = function.parameter_sizes;
    return sizes.size() == kernel.argument_count && std::equal(sizes.begin(), sizes.end(), kernel.argument_sizes);
}

// Of several plug-ins that have a kernel of this name, the one that has most of the module's entries: two
// modules may use a name for different things.
void resolve(Module &module) {
    auto shared = [&](const Plugin &plugin) {
        return std::count_if(module.functions.begin(), module.functions.end(),
                             [&](auto &entry) { return plugin.kernels.count(entry.first) != 0; });
    };
    std::vector<std::pair<long, const Plugin *>> ranked;
    for (auto &plugin : plugins()) ranked.emplace_back(shared(*plugin), plugin.get());
    std::stable_sort(ranked.begin(), ranked.end(), [](auto &a, auto &b) { return a.first > b.first; });
    for (auto &[name, function] : module.functions)
        for (auto &[count, plugin] : ranked) {
            auto found = plugin->kernels.find(name);
            if (found == plugin->kernels.end()) continue;
            function.kernel = &found->second;
            break;
        }
}

}  // namespace

// Called by the constructors of the plug-in that is being opened.
void register_kernel(const Kernel &kernel) {
    std::lock_guard lock(mutex);
    if (plugins().empty()) plugins().push_back(std::make_unique<Plugin>());  // linked in, not opened
    plugins().back()->kernels[kernel.name] = kernel;
}

void load_plugins() {
    std::lock_guard lock(mutex);
    static bool loaded = false;
    if (loaded) return;
    loaded = true;
    std::error_code error;
    std::vector<std::filesystem::path> files;
    for (auto &entry : std::filesystem::directory_iterator(plugin_folder(), error))
        if (entry.path().extension() == ".so") files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    for (auto &file : files) {
        plugins().push_back(std::make_unique<Plugin>());
        plugins().back()->path = file;
        if (!dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL)) {
            fprintf(stderr, "cuda emulator: kernels: %s\n", dlerror());
            plugins().pop_back();
        }
    }
    if (files.empty())
        fprintf(
            stderr,
            "cuda emulator: no kernels in %s (build.py puts them there; CUDA_EMULATOR_KERNELS names another folder)\n",
            plugin_folder().c_str());
}

Module *load_module(const char *ptx) {
    Reader reader(ptx);
    if (reader.next() != ".version") {
        fprintf(stderr, "cuda emulator: a module that is no PTX text (only that can be loaded here)\n");
        return nullptr;
    }
    std::lock_guard lock(mutex);
    auto *module = new Module;
    for (std::string word; !(word = reader.next()).empty();) {
        if (word != ".entry") continue;
        Function function = read_entry(reader);
        function.module = module;
        module->functions[function.name] = function;
    }
    resolve(*module);
    modules().insert(module);
    for (auto &[name, function] : module->functions) functions().insert(&function);
    return module;
}

void unload_module(Module *module) {
    std::lock_guard lock(mutex);
    for (auto &[name, function] : module->functions) functions().erase(&function);
    modules().erase(module);
    delete module;
}

bool is_module(const Module *module) {
    std::lock_guard lock(mutex);
    return modules().count(module) != 0;
}

bool is_function(const Function *function) {
    std::lock_guard lock(mutex);
    return functions().count(function) != 0;
}

Function *find_function(Module *module, const char *name) {
    auto found = module->functions.find(name);
    if (found == module->functions.end()) {
        fprintf(stderr, "cuda emulator: the module has no kernel %s\n", name);
        return nullptr;
    }
    Function &function = found->second;
    if (!function.kernel) {
        fprintf(stderr, "cuda emulator: kernel %s is in no plug-in of %s: run build.py\n", name,
                plugin_folder().c_str());
        return nullptr;
    }
    if (!same_parameters(function, *function.kernel)) {
        fprintf(stderr,
                "cuda emulator: kernel %s has %zu parameters in the PTX and %u in its plug-in, or they differ in "
                "size: run build.py\n",
                name, function.parameter_sizes.size(), function.kernel->argument_count);
        return nullptr;
    }
    return &function;
}

}  // namespace emulator
