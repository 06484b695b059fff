// Questions to the CUDA runtime, for host code without CUDA's headers.
#pragma once

#include <string>

namespace deltaic {
namespace cuda {

int toolkit_version();         // of this build, 13000 for 13.0
int driver_version();          // the newest CUDA that the driver runs; 0 without a driver
std::string device_problem();  // name of the error that keeps the runtime from seeing a card, or empty
bool has_kernels();            // whether this build holds code that the current card can run
void use_device(int index);    // the card that all launches go to, from any thread

// Makes that card the calling thread's current one, and afterwards the one it was: launches go to the current card,
// which each thread chooses for itself.
class DeviceGuard {
  public:
    DeviceGuard();
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = -1;
};

}  // namespace cuda
}  // namespace deltaic
