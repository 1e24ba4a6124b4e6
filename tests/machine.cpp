// The one program of the emulated computer that machine.py starts: passes the calls that emulated.py makes on to `kernels`, built from emulated.cpp.
//
// The computer's disk is a file on the host. A sector of it says which call is the latest, one which call is answered; between them and the
// host's program there is nothing but these numbers. The disk is read and written through its ports, so that no driver is required.
#include <fcntl.h>
#include <sched.h>
#include <sys/io.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <vector>

static const unsigned SECTOR = 512, ASKED = 0, ANSWERED = 1, LINE = 2, LINE_SECTORS = 16, MEMORY = LINE + LINE_SECTORS;
static const unsigned short DATA = 0x1f0, COUNT = 0x1f2, PLACE = 0x1f3, DEVICE = 0x1f6, COMMAND = 0x1f7, CONTROL = 0x3f6;
static const unsigned MOST = 256;  // sectors of one command
static const uint64_t LOST = ~uint64_t(0);  // in the place of a call's number: there will be no more answers

struct Message {
    uint64_t number, value;  // of a call; the bytes of its memory, or what it returned
};

static void wait_for(unsigned char mask, unsigned char bits) {
    while ((inb(COMMAND) & mask) != bits) {}
}

// each() moves one sector.
template <class Each>
static void transfer(unsigned char command, unsigned first, unsigned sectors, Each&& each) {
    for (unsigned at = 0; at < sectors; at += MOST) {
        const unsigned count = sectors - at < MOST ? sectors - at : MOST, place = first + at;
        wait_for(0x80, 0);  // until it is not busy
        outb(static_cast<unsigned char>(0xe0 | (place >> 24 & 15)), DEVICE);
        outb(static_cast<unsigned char>(count), COUNT);  // 256 as 0
        for (unsigned short i = 0; i < 3; i++) outb(static_cast<unsigned char>(place >> 8 * i), static_cast<unsigned short>(PLACE + i));
        outb(command, COMMAND);
        for (unsigned i = 0; i < count; i++) {
            wait_for(0x88, 0x08);  // not busy, and data requested
            each();
        }
    }
    wait_for(0x80, 0);
}

// <sys/io.h> does not tell the compiler that its insw and outsw read and write memory.
static void read_disk(unsigned first, unsigned sectors, char* to) {
    transfer(0x20, first, sectors, [&] {
        unsigned long words = SECTOR / 2;
        asm volatile("rep insw" : "+D"(to), "+c"(words) : "d"(DATA) : "memory");
    });
}

static void write_disk(unsigned first, unsigned sectors, const char* from) {
    transfer(0x30, first, sectors, [&] {
        unsigned long words = SECTOR / 2;
        asm volatile("rep outsw" : "+S"(from), "+c"(words) : "d"(DATA) : "memory");
    });
}

static void answer(uint64_t number, int64_t value) {
    const Message message{number, uint64_t(value)};
    char sector[SECTOR] = {};
    std::memcpy(sector, &message, sizeof message);
    write_disk(ANSWERED, 1, sector);
}

// The kernels' program. Linux here never keeps the tiles of a program that it interrupts for another (machine.py): the next instruction on tiles is
// an illegal one then. So this program, which alone could interrupt the kernels', runs first whenever it can, and waits while they compute.
class Program {
  public:
    int64_t greeting() {
        sched_param first = {};
        first.sched_priority = 1;
        if (sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first)) return lost();
        return started() ? value_ : lost();
    }

    int64_t call(const char* line, const std::vector<char>& memory, uint64_t bytes) {
        std::ofstream("/call", std::ios::binary).write(memory.data(), std::streamsize(bytes));
        std::fputs(line, calls_), std::fflush(calls_);
        return said() ? value_ : lost();
    }

  private:
    std::FILE *calls_ = nullptr, *answers_ = nullptr;
    long long value_ = 0;

    bool said() { return std::fscanf(answers_, "%lld", &value_) == 1; }

    bool started() {
        int to[2], from[2];
        if (pipe(to) || pipe(from)) return false;
        if (fork() == 0) {
            dup2(to[0], 0), dup2(from[1], 1);
            for (int end : {to[0], to[1], from[0], from[1]}) close(end);
            execl("/kernels", "kernels", nullptr);
            _exit(127);
        }
        close(to[0]), close(from[1]);
        calls_ = fdopen(to[1], "w"), answers_ = fdopen(from[0], "r");
        return said();
    }

    // Says by which signal the program ended, 0 for none. The host ends the computer.
    int64_t lost() {
        int status = 0;
        wait(&status);
        answer(LOST, WIFSIGNALED(status) ? WTERMSIG(status) : 0);
        for (;;) pause();
    }
};

int main() {
    if (ioperm(DATA, 8, 1) || ioperm(CONTROL, 1, 1)) return 1;
    signal(SIGPIPE, SIG_IGN);
    outb(2, CONTROL);  // no interrupts
    Program kernels;
    answer(1, kernels.greeting());
    char sector[SECTOR];
    Message asked;
    std::vector<char> line(LINE_SECTORS * SECTOR), memory;
    for (uint64_t number = 2;; usleep(1000)) {
        read_disk(ASKED, 1, sector);
        std::memcpy(&asked, sector, sizeof asked);
        if (asked.number != number) continue;
        const unsigned sectors = unsigned((asked.value + SECTOR - 1) / SECTOR);
        memory.resize(size_t(sectors) * SECTOR);
        read_disk(LINE, LINE_SECTORS, line.data());
        read_disk(MEMORY, sectors, memory.data());
        const int64_t value = kernels.call(line.data(), memory, asked.value);
        std::ifstream("/call", std::ios::binary).read(memory.data(), std::streamsize(asked.value));
        write_disk(MEMORY, sectors, memory.data());
        answer(number++, value);
    }
}
