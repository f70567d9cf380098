// Rank 1 never comes to a sum. Says what rank 0 hears of it, and of whatever it tries then; test_mpi.py runs it.
#include <chrono>
#include <iostream>
#include <thread>

#include "llama3.hpp"

int main() {
    const auto communicator = llama3::mpi(1);
    if (communicator->rank() == 1) std::this_thread::sleep_for(std::chrono::minutes(2));  // rank 0 ends this one
    const auto say = [](const auto& call) {
        try {
            call();
            std::cout << "nothing is wrong" << std::endl;
        } catch (const llama3::Error& error) {
            std::cout << error.what() << std::endl;
        }
    };
    std::vector<float> other(100), whole(200);
    std::vector<std::byte> message(8);
    say([&] {
        std::vector<float> values(1 << 16);  // gone before the sum is: nothing may be begun that would look at it
        communicator->all_reduce_sum(values);
    });
    say([&] { communicator->all_reduce_sum(other); });
    say([&] { communicator->gather(other, whole); });
    say([&] { communicator->broadcast(message); });
    say([&] { communicator->barrier(); });
    communicator->abort();
}
