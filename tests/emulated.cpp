// Runs calls of the CPU kernels for another process, which shares their memory as files: see emulated.py.
//
// One line of input for each call: a function's name, a target, a file, and for each pointer in the argument its offset there and the place in
// the file that it points to. The file begins with the argument. A line of output for each: what the function returned.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#define FUNCTIONS(each) \
    each(forward) each(backward) each(select) each(summarize) each(summarize_backward) each(mix_slopes) each(mix_slopes_backward) \
        each(group_units) each(group_units_backward)
#define DECLARE(name) int dit_accel_##name(const void*, int);
extern "C" {
int dit_accel_best_target();
FUNCTIONS(DECLARE)
}

int main() {
#define ENTRY(name) {#name, dit_accel_##name},
    const std::map<std::string, int (*)(const void*, int)> functions{FUNCTIONS(ENTRY)};
    std::cout << dit_accel_best_target() << std::endl;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string name, path;
        int target;
        if (!(words >> name >> target >> path) || !functions.count(name)) return 2;
        int file = open(path.c_str(), O_RDWR);
        struct stat about;
        if (file < 0 || fstat(file, &about)) return 3;
        void* memory = mmap(nullptr, size_t(about.st_size), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        if (memory == MAP_FAILED) return 4;
        char* base = static_cast<char*>(memory);
        for (size_t offset, place; words >> offset >> place;) {
            char* pointer = base + place;
            std::memcpy(base + offset, &pointer, sizeof pointer);
        }
        std::cout << functions.at(name)(base, target) << std::endl;
        munmap(memory, size_t(about.st_size));
    }
}
