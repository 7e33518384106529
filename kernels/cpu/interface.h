/* What `cpu_library.Library` compares before it calls anything: the version, then the sizes of the structures. Last of a
   file's includes. */

EXPORTED int cflow_fast_interface(int which) {
    static const int known[] = {INTERFACE, sizeof(decoder), sizeof(task)
#if !defined(FLOW_BF16)
        , sizeof(map_scale), sizeof(map_task)
#endif
    };
    return known[which];
}
